//! nvmx's command line.

use core::fmt;

use arrayvec::{ArrayString, ArrayVec};
use log::LevelFilter;

/// `fields=`: how L2's VMREAD and VMWRITE reach vmcs12.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FieldsOption {
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

/// `ept12=`: how nvmx learns what L2 changed in its EPT tables before an INVEPT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ept12 {
    /// By the dirty flags of the pages that they lie in, where the processor has them and one processor runs L2.
    Watch,
    /// By comparing all of them: for an L2 that lets devices write its tables.
    Compare,
}

/// `counters=`: who may read nvmx's counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CountersOption {
    /// L2 in ring 0: programs would see what other programs and other guests do.
    Kernel,
    /// Programs of L2, too.
    All,
}

/// `serial=`: the port that nvmx writes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Serial {
    /// Where a 16550 has its registers; `None`: nvmx writes to no port.
    pub port: Option<u16>,
    /// What 115,200 baud are divided by.
    pub divisor: u16,
}

impl Serial {
    /// COM1 with 115,200 baud.
    pub const COM1: Self = Self { port: Some(0x3F8), divisor: 1 };

    /// `com1`, `com2`, a number in hexadecimal behind `0x`, or `none`; a comma and the baud rate may follow.
    fn parse(text: &str) -> Option<Self> {
        let (place, baud) = match text.split_once(',') {
            Some((place, baud)) => (place, baud.parse().ok()?),
            None => (text, 115_200u32),
        };
        let port = match place {
            "none" => None,
            "com1" => Some(0x3F8),
            "com2" => Some(0x2F8),
            // The eight registers lie behind the first one.
            _ => Some(u16::from_str_radix(place.strip_prefix("0x")?, 16).ok().filter(|at| *at != 0 && at % 8 == 0)?),
        };
        let divisor = 115_200u32.checked_div(baud).filter(|n| *n > 0 && 115_200 % baud == 0)?;
        Some(Self { port, divisor: divisor.try_into().ok()? })
    }
}

/// `exit=`: what nvmx does after its last line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// As `ports` on an emulated machine, else as `none`.
    Auto,
    /// Only halt.
    None,
    /// Write the ports that end an emulated machine, then halt.
    Ports,
}

/// `stop=`: whether nvmx ends before L2 runs, to show that a loader, firmware and the start of the processors work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopOption {
    /// L2 runs.
    Never,
    /// nvmx ends when L2 is loaded and all processors have started, and says what it found. Needs no VMX.
    Cpus,
}

/// What the command line asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// `log=`: the least severe level that is printed.
    pub log: LevelFilter,
    /// `fields=`
    pub fields: FieldsOption,
    /// `vmcs=`
    pub vmcs: Vmcs,
    /// `cpus=`: how many processors run L2 at most; the rest is parked.
    pub cpus: Option<u32>,
    /// `frames=`: MiB of nvmx's own memory for VMCSs and tables, of all processors together.
    pub frames: Option<u32>,
    /// `ept02=`: how many tables the composed EPTs of a processor may have beyond their reserve.
    pub ept02: Option<u32>,
    /// `ept12=`
    pub ept12: Ept12,
    /// `counters=`
    pub counters: CountersOption,
    /// `measure=`: whether exits are counted by reason, and nvmx's own time is.
    pub measure: bool,
    /// `explain=`: whether what VMX refuses is told on the serial line.
    pub explain: bool,
    /// `stale=`: whether L3's use of translations that lack an INVEPT of L2 is told. For debugging: dear.
    pub stale: bool,
    /// `trace=`: how many exits each processor keeps, to be told at the end; 0: none.
    pub trace: u32,
    /// `serial=`
    pub serial: Serial,
    /// `exit=`
    pub exit: Exit,
    /// `stop=`
    pub stop: StopOption,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            log: LevelFilter::Info,
            fields: FieldsOption::Auto,
            vmcs: Vmcs::Auto,
            cpus: None,
            frames: None,
            ept02: None,
            ept12: Ept12::Watch,
            counters: CountersOption::Kernel,
            measure: true,
            explain: true,
            stale: false,
            trace: 0,
            serial: Serial::COM1,
            exit: Exit::Auto,
            stop: StopOption::Never,
        }
    }
}

/// Most bytes of a bad word that an error repeats.
const SHOWN: usize = 32;

/// A value that its option does not have. Its text names the word and what is accepted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BadValue {
    option: &'static str,
    value: ArrayString<SHOWN>,
    accepted: &'static str,
}

impl fmt::Display for BadValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { option, value, accepted } = self;
        write!(f, "bad value '{value}' for option '{option}': accepted is {option}={accepted}")
    }
}

/// Words that are no option: a loader may add some of its own, and an older nvmx may lack one.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct UnknownWords {
    /// The first of them.
    pub words: ArrayVec<ArrayString<SHOWN>, 8>,
    /// How many there are beyond these.
    pub more: usize,
}

impl UnknownWords {
    fn add(&mut self, word: &str) {
        if self.words.try_push(shown(word)).is_err() {
            self.more += 1;
        }
    }
}

impl fmt::Display for UnknownWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("unknown options are passed over:")?;
        self.words.iter().try_for_each(|word| write!(f, " '{word}'"))?;
        if self.more > 0 {
            write!(f, " and {} more", self.more)?;
        }
        f.write_str("; nvmx accepts ")?;
        for (i, (option, accepted)) in ACCEPTED.iter().enumerate() {
            write!(f, "{}{option}={accepted}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

const LOG: &str = "off|error|warn|info|debug|trace";
const FIELDS: &str = "auto|zero-copy|trapped";
const VMCS: &str = "auto|instructions|memory";
const CPUS: &str = "all|1|2|3|...";
const FRAMES: &str = "auto|1|2|3|...";
const EPT02: &str = "auto|0|1|2|...";
const EPT12: &str = "watch|compare";
const COUNTERS: &str = "kernel|all";
const MEASURE: &str = "on|off";
const EXPLAIN: &str = "on|off";
const STALE: &str = "off|warn";
const TRACE: &str = "off|1|2|3|...";
const SERIAL: &str = "com1|com2|0x2f8|0x3f8,9600|...|none";
const EXIT: &str = "auto|none|ports";
const STOP: &str = "never|cpus";
const ACCEPTED: [(&str, &str); 15] = [
    ("log", LOG),
    ("fields", FIELDS),
    ("vmcs", VMCS),
    ("cpus", CPUS),
    ("frames", FRAMES),
    ("ept02", EPT02),
    ("ept12", EPT12),
    ("counters", COUNTERS),
    ("measure", MEASURE),
    ("explain", EXPLAIN),
    ("stale", STALE),
    ("trace", TRACE),
    ("serial", SERIAL),
    ("exit", EXIT),
    ("stop", STOP),
];

impl Options {
    /// Parses words. A later word wins over an earlier one for the same option.
    pub fn parse(words: impl IntoIterator<Item = impl AsRef<str>>) -> Result<(Self, UnknownWords), BadValue> {
        let mut options = Self::default();
        let mut unknown = UnknownWords::default();
        for word in words {
            let word = word.as_ref();
            let (option, value) = word.split_once('=').unwrap_or((word, ""));
            let bad = |option, accepted| BadValue { option, value: shown(value), accepted };
            match option {
                "log" => options.log = value.parse().map_err(|_| bad("log", LOG))?,
                "fields" => {
                    options.fields = match value {
                        "auto" => FieldsOption::Auto,
                        "zero-copy" => FieldsOption::ZeroCopy,
                        "trapped" => FieldsOption::Trapped,
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
                "frames" => {
                    options.frames = match value {
                        "auto" => None,
                        _ => Some(value.parse().ok().filter(|n| *n > 0).ok_or_else(|| bad("frames", FRAMES))?),
                    }
                }
                "ept02" => {
                    options.ept02 = match value {
                        "auto" => None,
                        _ => Some(value.parse().map_err(|_| bad("ept02", EPT02))?),
                    }
                }
                "ept12" => {
                    options.ept12 = match value {
                        "watch" => Ept12::Watch,
                        "compare" => Ept12::Compare,
                        _ => return Err(bad("ept12", EPT12)),
                    }
                }
                "counters" => {
                    options.counters = match value {
                        "kernel" => CountersOption::Kernel,
                        "all" => CountersOption::All,
                        _ => return Err(bad("counters", COUNTERS)),
                    }
                }
                "measure" => {
                    options.measure = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(bad("measure", MEASURE)),
                    }
                }
                "explain" => {
                    options.explain = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(bad("explain", EXPLAIN)),
                    }
                }
                "stale" => {
                    options.stale = match value {
                        "off" => false,
                        "warn" => true,
                        _ => return Err(bad("stale", STALE)),
                    }
                }
                "trace" => {
                    options.trace = match value {
                        "off" => 0,
                        _ => value.parse().ok().filter(|n| *n > 0).ok_or_else(|| bad("trace", TRACE))?,
                    }
                }
                "serial" => options.serial = Serial::parse(value).ok_or_else(|| bad("serial", SERIAL))?,
                "exit" => {
                    options.exit = match value {
                        "auto" => Exit::Auto,
                        "none" => Exit::None,
                        "ports" => Exit::Ports,
                        _ => return Err(bad("exit", EXIT)),
                    }
                }
                "stop" => {
                    options.stop = match value {
                        "never" => StopOption::Never,
                        "cpus" => StopOption::Cpus,
                        _ => return Err(bad("stop", STOP)),
                    }
                }
                _ => unknown.add(word),
            }
        }
        Ok((options, unknown))
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

    fn parse(line: &str) -> Result<(Options, UnknownWords), BadValue> {
        Options::parse(line.split_ascii_whitespace())
    }

    #[test]
    fn an_empty_line_means_the_defaults() {
        assert_eq!(parse("  "), Ok(Default::default()));
    }

    #[test]
    fn every_accepted_value_parses() {
        for (option, accepted) in ACCEPTED {
            for value in accepted.split('|').filter(|value| *value != "...") {
                assert!(Options::parse([format!("{option}={value}")]).is_ok(), "{option}={value}");
            }
        }
        let (all, unknown) = parse(
            "log=trace fields=trapped vmcs=memory cpus=3 frames=5 ept02=7 ept12=compare counters=all measure=off explain=off stale=warn trace=64 serial=com2 exit=none stop=cpus",
        )
        .unwrap();
        assert_eq!(unknown, UnknownWords::default());
        assert_eq!(
            all,
            Options {
                log: LevelFilter::Trace,
                fields: FieldsOption::Trapped,
                vmcs: Vmcs::Memory,
                cpus: Some(3),
                frames: Some(5),
                ept02: Some(7),
                ept12: Ept12::Compare,
                counters: CountersOption::All,
                measure: false,
                explain: false,
                stale: true,
                trace: 64,
                serial: Serial { port: Some(0x2F8), divisor: 1 },
                exit: Exit::None,
                stop: StopOption::Cpus
            }
        );
    }

    #[test]
    fn unknown_options_are_named_with_what_is_accepted_and_the_others_count() {
        let (options, unknown) = parse("quiet log=warn colour=red").unwrap();
        assert_eq!(options, Options { log: LevelFilter::Warn, ..Options::default() });
        assert_eq!(
            unknown.to_string(),
            "unknown options are passed over: 'quiet' 'colour=red'; nvmx accepts log=off|error|warn|info|debug|trace, \
             fields=auto|zero-copy|trapped, vmcs=auto|instructions|memory, cpus=all|1|2|3|..., frames=auto|1|2|3|..., \
             ept02=auto|0|1|2|..., ept12=watch|compare, counters=kernel|all, measure=on|off, explain=on|off, stale=off|warn, trace=off|1|2|3|..., serial=com1|com2|0x2f8|0x3f8,9600|...|none, \
             exit=auto|none|ports, stop=never|cpus"
        );
        let (_, many) = parse("a b c d e f g h i j").unwrap();
        assert!(many.to_string().contains("'h' and 2 more; "), "{many}");
    }

    #[test]
    fn the_serial_port_is_a_name_or_an_address_with_a_rate() {
        let parsed = |text: &str| parse(&format!("serial={text}")).map(|(options, _)| options.serial).ok();
        let at = |port, divisor| Some(Serial { port: Some(port), divisor });
        assert_eq!(parsed("com1"), Some(Serial::COM1));
        assert_eq!(parsed("com2,9600"), at(0x2F8, 12));
        assert_eq!(parsed("0xe000"), at(0xE000, 1));
        assert_eq!(parsed("0x3e8,50"), at(0x3E8, 2304));
        assert_eq!(parsed("none"), Some(Serial { port: None, divisor: 1 }));
        for bad in
            ["", "com3", "0x", "0x0", "0x3f9", "0x10000", "3f8", "com1,", "com1,0", "com1,115201", "com1,7", "com1,1"]
        {
            assert_eq!(parsed(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_bad_value_is_named_with_what_is_accepted() {
        let text = parse("fields=fast").unwrap_err().to_string();
        assert_eq!(text, "bad value 'fast' for option 'fields': accepted is fields=auto|zero-copy|trapped");
        assert!(parse("log").is_err());
        assert!(parse("log=").is_err());
    }

    proptest! {
        #[test]
        fn any_line_parses_or_gives_an_error_with_text(line in "\\PC{0,200}") {
            if let Err(error) = parse(&line) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}
