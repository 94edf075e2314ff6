//! nvmx's command line.

use core::fmt;

use arrayvec::ArrayString;
use log::LevelFilter;

/// `fields=`: how L2's VMREAD and VMWRITE reach vmcs12.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fields {
    /// The best that the processor can do.
    Auto,
    /// VMCS shadowing, or nvmx refuses to start.
    ZeroCopy,
    /// Every access exits, even where the processor could shadow.
    Trapped,
}

/// `vmcs=`: how nvmx reaches fields of a VMCS that is not current.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vmcs {
    /// In memory under KVM if they are found there, else by instructions.
    Auto,
    /// By VMREAD and VMWRITE, once it is current.
    Instructions,
    /// In memory, or nvmx refuses to start.
    Memory,
}

/// `counters=`: who may read nvmx's counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Counters {
    /// L2 in ring 0: programs would see what other programs and other guests do.
    Kernel,
    /// Programs of L2, too.
    All,
}

/// `exit=`: what nvmx does after its last line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// Only halt.
    None,
    /// Write the ports that end an emulated machine, then halt.
    Ports,
}

/// What the command line asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// `log=`: the least severe level that is printed.
    pub log: LevelFilter,
    /// `fields=`
    pub fields: Fields,
    /// `vmcs=`
    pub vmcs: Vmcs,
    /// `cpus=`: how many processors run L2 at most; the rest is parked.
    pub cpus: Option<u32>,
    /// `ept02=`: how many tables the composed EPTs of a processor may have beyond their reserve.
    pub ept02: Option<u32>,
    /// `counters=`
    pub counters: Counters,
    /// `explain=`: whether what VMX refuses is told on the serial line.
    pub explain: bool,
    /// `exit=`
    pub exit: Exit,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            log: LevelFilter::Info,
            fields: Fields::Auto,
            vmcs: Vmcs::Auto,
            cpus: None,
            ept02: None,
            counters: Counters::Kernel,
            explain: true,
            exit: Exit::Ports,
        }
    }
}

/// Most bytes of a bad word that an error repeats.
const SHOWN: usize = 32;

/// A word of the command line that nvmx does not understand. Its text names the word and what is accepted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OptionError {
    /// No option of that name.
    Unknown(ArrayString<SHOWN>),
    /// The option exists, the value does not.
    BadValue {
        /// The option.
        option: &'static str,
        /// What was given.
        value: ArrayString<SHOWN>,
        /// What it accepts.
        accepted: &'static str,
    },
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(word) => {
                write!(f, "unknown option '{word}': nvmx accepts ")?;
                for (i, (option, accepted)) in ACCEPTED.iter().enumerate() {
                    write!(f, "{}{option}={accepted}", if i == 0 { "" } else { ", " })?;
                }
                Ok(())
            }
            Self::BadValue { option, value, accepted } => {
                write!(f, "bad value '{value}' for option '{option}': accepted is {option}={accepted}")
            }
        }
    }
}

const LOG: &str = "off|error|warn|info|debug|trace";
const FIELDS: &str = "auto|zero-copy|trapped";
const VMCS: &str = "auto|instructions|memory";
const CPUS: &str = "all|1|2|3|...";
const EPT02: &str = "auto|0|1|2|...";
const COUNTERS: &str = "kernel|all";
const EXPLAIN: &str = "on|off";
const EXIT: &str = "none|ports";
const ACCEPTED: [(&str, &str); 8] = [
    ("log", LOG),
    ("fields", FIELDS),
    ("vmcs", VMCS),
    ("cpus", CPUS),
    ("ept02", EPT02),
    ("counters", COUNTERS),
    ("explain", EXPLAIN),
    ("exit", EXIT),
];

impl Options {
    /// Parses words separated by blanks. A later word wins over an earlier one for the same option.
    pub fn parse(command_line: &str) -> Result<Self, OptionError> {
        let mut options = Self::default();
        for word in command_line.split_ascii_whitespace() {
            let (option, value) = word.split_once('=').unwrap_or((word, ""));
            let bad = |option, accepted| OptionError::BadValue { option, value: shown(value), accepted };
            match option {
                "log" => options.log = value.parse().map_err(|_| bad("log", LOG))?,
                "fields" => {
                    options.fields = match value {
                        "auto" => Fields::Auto,
                        "zero-copy" => Fields::ZeroCopy,
                        "trapped" => Fields::Trapped,
                        _ => return Err(bad("fields", FIELDS)),
                    }
                }
                "vmcs" => {
                    options.vmcs = match value {
                        "auto" => Vmcs::Auto,
                        "instructions" => Vmcs::Instructions,
                        "memory" => Vmcs::Memory,
                        _ => return Err(bad("vmcs", VMCS)),
                    }
                }
                "cpus" => {
                    options.cpus = match value {
                        "all" => None,
                        _ => Some(value.parse().ok().filter(|n| *n > 0).ok_or_else(|| bad("cpus", CPUS))?),
                    }
                }
                "ept02" => {
                    options.ept02 = match value {
                        "auto" => None,
                        _ => Some(value.parse().map_err(|_| bad("ept02", EPT02))?),
                    }
                }
                "counters" => {
                    options.counters = match value {
                        "kernel" => Counters::Kernel,
                        "all" => Counters::All,
                        _ => return Err(bad("counters", COUNTERS)),
                    }
                }
                "explain" => {
                    options.explain = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(bad("explain", EXPLAIN)),
                    }
                }
                "exit" => {
                    options.exit = match value {
                        "none" => Exit::None,
                        "ports" => Exit::Ports,
                        _ => return Err(bad("exit", EXIT)),
                    }
                }
                _ => return Err(OptionError::Unknown(shown(word))),
            }
        }
        Ok(options)
    }
}

/// The first bytes of a bad word.
fn shown(word: &str) -> ArrayString<SHOWN> {
    let mut out = ArrayString::new();
    for c in word.chars() {
        if out.try_push(c).is_err() {
            break;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_line_means_the_defaults() {
        assert_eq!(Options::parse("  "), Ok(Options::default()));
    }

    #[test]
    fn every_accepted_value_parses() {
        for (option, accepted) in ACCEPTED {
            for value in accepted.split('|').filter(|value| *value != "...") {
                assert!(Options::parse(&format!("{option}={value}")).is_ok(), "{option}={value}");
            }
        }
        let all =
            Options::parse("log=trace fields=trapped vmcs=memory cpus=3 ept02=7 counters=all explain=off exit=none")
                .unwrap();
        assert_eq!(
            all,
            Options {
                log: LevelFilter::Trace,
                fields: Fields::Trapped,
                vmcs: Vmcs::Memory,
                cpus: Some(3),
                ept02: Some(7),
                counters: Counters::All,
                explain: false,
                exit: Exit::None
            }
        );
    }

    #[test]
    fn an_unknown_option_is_named_with_what_is_accepted() {
        let text = Options::parse("log=info colour=red").unwrap_err().to_string();
        assert_eq!(
            text,
            "unknown option 'colour=red': nvmx accepts log=off|error|warn|info|debug|trace, \
             fields=auto|zero-copy|trapped, vmcs=auto|instructions|memory, cpus=all|1|2|3|..., ept02=auto|0|1|2|..., \
             counters=kernel|all, explain=on|off, exit=none|ports"
        );
    }

    #[test]
    fn a_bad_value_is_named_with_what_is_accepted() {
        let text = Options::parse("fields=fast").unwrap_err().to_string();
        assert_eq!(text, "bad value 'fast' for option 'fields': accepted is fields=auto|zero-copy|trapped");
        assert!(Options::parse("log").is_err());
        assert!(Options::parse("log=").is_err());
    }

    proptest! {
        #[test]
        fn any_line_parses_or_gives_an_error_with_text(line in "\\PC{0,200}") {
            if let Err(error) = Options::parse(&line) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}
