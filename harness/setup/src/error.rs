//! How the host program ends: one type, one exit code each.

use std::process::ExitCode;

/// Why a command did not succeed. Everything else that goes wrong (a file that cannot be written, a program that is not
/// there) counts as [`Stop::Environment`].
#[derive(Debug, thiserror::Error)]
pub enum Stop {
    /// A guest or nvmx failed, or a test did.
    #[error("{0}")]
    Guest(String),
    /// The user's own L2 reached the limit.
    #[error("{0}")]
    Limit(String),
    /// The user's own L2 halted with interrupts off.
    #[error("{0}")]
    Halted(String),
    /// The command line asks for something that does not exist.
    #[error("{0}")]
    Usage(String),
    /// The machine lacks something; `todo` are the commands that help.
    #[error("{what}{}", todo_lines(.todo))]
    Environment {
        /// What is missing
        what: String,
        /// Commands for the user to type
        todo: Vec<String>,
    },
    /// Ctrl-C
    #[error("interrupted")]
    Interrupted,
}

impl Stop {
    /// A missing thing with nothing to type.
    pub fn environment(what: impl Into<String>) -> Self {
        Stop::Environment { what: what.into(), todo: Vec::new() }
    }

    /// The process's exit code: 1 the guest failed, 2 usage, 3 environment, 4 limit, 5 halted, 130 interrupted.
    pub fn code(&self) -> u8 {
        match self {
            Stop::Guest(_) => 1,
            Stop::Usage(_) => 2,
            Stop::Environment { .. } => 3,
            Stop::Limit(_) => 4,
            Stop::Halted(_) => 5,
            Stop::Interrupted => 130,
        }
    }
}

fn todo_lines(todo: &[String]) -> String {
    let mut text = String::new();
    if !todo.is_empty() {
        text.push_str("\nplease type this, then try again:");
        for line in todo {
            text.push_str("\n  ");
            text.push_str(line);
        }
    }
    text
}

/// The exit code of any error.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(error.chain().find_map(|e| e.downcast_ref::<Stop>()).map_or(3, Stop::code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_package_is_told_with_the_command_to_type() {
        let stop =
            Stop::Environment { what: "xorriso is missing".into(), todo: vec!["sudo apt-get install xorriso".into()] };
        assert_eq!(
            stop.to_string(),
            "xorriso is missing\nplease type this, then try again:\n  sudo apt-get install xorriso"
        );
    }

    #[test]
    fn a_wrapped_stop_keeps_its_exit_code() {
        let error = anyhow::Error::from(Stop::Guest("no".into())).context("while booting");
        assert_eq!(format!("{:?}", exit_code(&error)), format!("{:?}", ExitCode::from(1)));
        let other = anyhow::anyhow!("disk full");
        assert_eq!(format!("{:?}", exit_code(&other)), format!("{:?}", ExitCode::from(3)));
    }
}
