//! What a guest's boot may use, handed to its boot on a machine that offers more.
//!
//! Both boots of a comparison must see the same capabilities. A guest prints those it goes by as a `caps` record; the boot on
//! the richer machine gets them on its command line as soon as they are known.

use crate::backend::Spec;
use crate::transcript::Line;
use l2_protocol::Kind;
use nvmx_setup::proc;
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// The capabilities of boots by name; `None` once a boot is over that has not told any.
#[derive(Default)]
pub struct Known {
    boots: Mutex<BTreeMap<String, Option<String>>>,
    changed: Condvar,
}

impl Known {
    /// Looks at a line of a boot.
    pub fn look(&self, boot: &str, line: &Line) {
        if let Line::Record(record) = line {
            if record.kind == Kind::Caps {
                self.set(boot, record.get("msrs").map(str::to_string));
            }
        }
    }

    /// The boot is over and tells nothing more.
    pub fn over(&self, boot: &str) {
        self.set(boot, None);
    }

    /// What was told first stays.
    fn set(&self, boot: &str, caps: Option<String>) {
        self.boots.lock().unwrap_or_else(PoisonError::into_inner).entry(boot.into()).or_insert(caps);
        self.changed.notify_all();
    }

    /// Waits until the boot has told its capabilities or is over, or until Ctrl-C.
    pub fn wait(&self, boot: &str) -> Option<String> {
        let mut boots = self.boots.lock().unwrap_or_else(PoisonError::into_inner);
        while !proc::interrupted() {
            if let Some(caps) = boots.get(boot) {
                return caps.clone();
            }
            let woken = self.changed.wait_timeout(boots, Duration::from_millis(200));
            boots = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        None
    }
}

/// The boot of a guest alone on the machine, kept to these capabilities.
pub fn clamped(mut spec: Spec, caps: Option<&str>) -> Spec {
    if let Some(caps) = caps {
        spec.kernel.args = format!("{} caps={caps}", spec.kernel.args).trim_start().into();
    }
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_of_a_boot_counts() {
        let known = Known::default();
        known.look("nvmx", &Line::parse("@L2 check name=a"));
        known.look("nvmx", &Line::parse("@L2 caps msrs=1,-"));
        known.over("nvmx");
        known.over("silent");
        assert_eq!(known.wait("nvmx").as_deref(), Some("1,-"));
        assert_eq!(known.wait("silent"), None);
    }

    #[test]
    fn a_boot_that_comes_later_is_waited_for() {
        let known = Known::default();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| known.wait("nvmx"));
            known.look("nvmx", &Line::parse("@L2 caps msrs=1"));
            assert_eq!(waits.join().unwrap().as_deref(), Some("1"));
        });
    }
}
