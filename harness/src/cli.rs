//! The command line.

use crate::backend::host::L0;
use crate::shard::Shard;
use clap::{Args, Parser, Subcommand, ValueEnum};
use nvmx_setup::error::Stop;
use std::path::PathBuf;
use std::time::Duration;

/// nvmx: an L1 hypervisor that virtualizes VMX itself.
///
/// Builds the images, sets up an emulated VMX machine where there is no real one, boots, tests and measures.
#[derive(Debug, Parser)]
#[command(name = "nvmx", bin_name = "./nvmx", version, after_help = AFTER_HELP)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Cmd,

    /// Show nvmx's log, all records, and what the build says
    #[arg(long, short, global = true)]
    pub verbose: bool,
}

const AFTER_HELP: &str = "Exit codes: 0 success, 1 a guest or a test failed, 2 usage, 3 the machine lacks something;\n\
    of an L2 of your own also 4 the limit, 5 halted with interrupts off.\n\
    Levels: L0 the machine or KVM, L1 nvmx, L2 the guest hypervisor, L3 its guest.";

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Cmd {
    /// Run an L2 hypervisor and its L3 guest under nvmx and show what each exit costs
    Run(RunArgs),
    /// Run every test: host tests, then boots
    Test(TestArgs),
    /// Run guests alone and under nvmx and compare what they saw, record by record
    Diff(DiffArgs),
    /// Search for inputs that break the pure core, by libFuzzer
    Fuzz(FuzzArgs),
    /// Say which tools are there, which are missing, and which L0 would be used and why
    Doctor(DoctorArgs),
    /// Say what an exit reason, a rule, a field, an error number or an event is
    Explain(ExplainArgs),
    /// Show what `run --trace` recorded: every exit, why it came and what followed
    Trace(TraceArgs),
    /// Show the fields of vmcs12, vmcs02 and vmcs01 side by side at an exit of a trace, and who wrote them last
    Vmcs(VmcsArgs),
    /// Count exits and their cost by level and reason
    Stat(StatArgs),
    /// Make a folder with a guest hypervisor to begin with
    New(NewArgs),
    /// Make an archive that runs without building anything
    Release(ReleaseArgs),
    /// Set up the compiler for the bare machine and print, as shell variables, how to call it
    Toolchain,
    /// Run the experiments of the story of the VM exit (docs/lab.md) and say which of its claims hold
    Lab(LabArgs),
    /// Compare the counts of a run with the limits and the ledger in benches/budget.json, or with an earlier run
    Bench(BenchArgs),
    /// List the faults of Bochs that nvmx's build cures, or write the cures as one patch
    Bochs(BochsArgs),
}

/// Where boots run.
#[derive(Clone, Debug, Args)]
pub struct L0Args {
    /// What runs nvmx: the machine that is emulated by Bochs, KVM, or KVM on the emulated machine
    #[arg(long, value_enum, default_value = "auto", help_heading = "Machine")]
    pub l0: L0,

    /// Use this Bochs instead of building one
    #[arg(long, value_name = "PATH", help_heading = "Machine")]
    pub bochs: Option<PathBuf>,

    /// CPU model of Bochs (`tigerlake` has the most VMX features)
    #[arg(long, value_name = "MODEL", help_heading = "Machine")]
    pub cpu_model: Option<String>,

    /// Memory of the machine; with --depth, this much for each nvmx in the stack
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..=65536), help_heading = "Machine")]
    pub memory: u32,

    /// Processors of the machine; all of them run L2
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8), help_heading = "Machine")]
    pub cpus: u32,

    /// End a boot after this time and say where each level stopped. A second is 100 M instructions on Bochs and a second of CPU time
    /// with KVM, so that a loaded host ends no boot [default: 120; with KVM on Bochs, --depth, or diff: 600]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Machine")]
    pub timeout: Option<Duration>,
}

/// Who does L1's job.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum L1 {
    /// nvmx
    Nvmx,
    /// nvmx, and for comparison KVM in its place, with the same guest on the same machine
    Kvm,
}

/// How L2's VMREAD and VMWRITE reach vmcs12.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Fields {
    /// The best that the CPU can do
    Auto,
    /// VMCS shadowing, no copies
    ZeroCopy,
    /// Every access exits
    Trapped,
}

impl Fields {
    /// The value of nvmx's option `fields=`.
    pub fn option(self) -> &'static str {
        match self {
            Fields::Auto => "auto",
            Fields::ZeroCopy => "zero-copy",
            Fields::Trapped => "trapped",
        }
    }
}

/// `run`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Which guest hypervisor runs as L2: one of l2-guests/, `linux-kvm`, which runs Linux in QEMU, `xen`, which runs Linux
    /// in a PVH domain, or an image of your own: a multiboot or multiboot2 file, a Linux kernel (bzImage), or a folder in which
    /// `make` or `cargo` builds one (docs/l2-guide.md)
    #[arg(long, value_name = "NAME|PATH", default_value = "cascade")]
    pub l2: String,

    /// The guest's command line
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    pub l2_args: String,

    /// A file that L2 gets as a boot module, and its command line; may be given again (a comma in the file's name is doubled)
    #[arg(long, value_name = "FILE[,ARGS]", help_heading = "Your own L2")]
    pub module: Vec<String>,

    /// The initial file system of a Linux kernel
    #[arg(long, value_name = "FILE", help_heading = "Your own L2", conflicts_with = "module")]
    pub initrd: Option<PathBuf>,

    /// Only run L2 alone on the machine, without nvmx
    #[arg(long, help_heading = "Your own L2", conflicts_with_all = ["depth", "l1"])]
    pub bare: bool,

    /// End the boot, as passed, once a line contains this
    #[arg(long, value_name = "TEXT", help_heading = "Your own L2")]
    pub until: Option<String>,

    /// Build and boot again whenever a file of L2 changes, until Ctrl-C
    #[arg(long, help_heading = "Your own L2", conflicts_with = "json")]
    pub watch: bool,

    /// How L2's VMREAD and VMWRITE reach nvmx
    #[arg(long, value_enum, default_value = "auto")]
    pub fields: Fields,

    /// How refused VM entries and failed VMX instructions of L2 are reported: every broken rule with its fields and values
    #[arg(long, value_enum, default_value = "text", num_args = 0..=1, default_missing_value = "text")]
    pub explain: Explain,

    /// Who runs L2: nvmx, or for comparison KVM too
    #[arg(long, value_enum, default_value = "nvmx")]
    pub l1: L1,

    /// Stack N nvmx, each in the one before it, and show how costs grow with every level
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8), conflicts_with = "l1")]
    pub depth: u32,

    /// Write the figures to this file too (docs/run-schema.md); `-` is standard output, to which nothing else goes then
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Record every VM exit of the boots in this file, for `./nvmx trace`
    #[arg(long, value_name = "FILE", conflicts_with = "watch")]
    pub trace: Option<PathBuf>,

    /// Who records
    #[command(flatten)]
    pub recorder: Recorder,

    /// Serve gdb: one boot that waits for gdb, and stops at the first entry to LEVEL [default: L2]; docs/debugging.md
    #[arg(long, value_name = "LEVEL", num_args = 0..=1, default_missing_value = "L2", value_parser = level,
        conflicts_with_all = ["watch", "json", "trace", "report", "depth", "l1"])]
    pub gdb: Option<u8>,

    /// Write a report: FILE.html, one page for a browser that needs nothing else, FILE.md or FILE.csv
    #[arg(long, value_name = "FILE", conflicts_with = "watch")]
    pub report: Option<PathBuf>,

    /// The machine
    #[command(flatten)]
    pub l0: L0Args,
}

impl RunArgs {
    /// Whether nvmx's own trace can be had of this run.
    ///
    /// # Errors
    /// [`Stop::Usage`] if not.
    pub fn of_one_nvmx(&self) -> Result<(), Stop> {
        let text = "nvmx's own trace (--trace-by nvmx) is that of one nvmx: it works without --bare and --depth";
        if self.bare || self.depth > 1 { Err(Stop::Usage(text.into())) } else { Ok(()) }
    }
}

/// Who records exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RecordedBy {
    /// The emulator (our build of Bochs): all exits, at no cost for guests
    Emulator,
    /// nvmx itself, in its memory: the last exits of each CPU, on any L0
    Nvmx,
}

/// How exits are recorded.
#[derive(Clone, Copy, Debug, Args)]
pub struct Recorder {
    /// Who records VM exits [default: the emulator where it can, else nvmx]
    #[arg(long, value_enum)]
    pub trace_by: Option<RecordedBy>,

    /// How many exits nvmx keeps for each CPU
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub trace_keep: u32,
}

/// The views of a trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum TraceFormat {
    /// Trees in words
    Text,
    /// A timeline for Perfetto (ui.perfetto.dev) and Chrome
    Perfetto,
    /// Stacks and their ticks, one a line
    Folded,
    /// A flame graph
    Svg,
    /// A line an exit
    Csv,
}

/// `trace`
#[derive(Debug, Args)]
pub struct TraceArgs {
    /// What `./nvmx run --trace FILE` wrote
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Of this boot of the file [default: the one under nvmx]
    #[arg(long, value_name = "NAME")]
    pub boot: Option<String>,

    /// Only trees in which an exit has this reason, by name or number
    #[arg(long, value_name = "REASON")]
    pub reason: Option<String>,

    /// Only trees that begin at this level: L2, L3
    #[arg(long, value_name = "LEVEL", value_parser = level)]
    pub level: Option<u8>,

    /// The tree with exit number N, and the trees before and after it
    #[arg(long, value_name = "N", conflicts_with_all = ["reason", "level", "top"])]
    pub around: Option<u32>,

    /// The N most expensive trees
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "10")]
    pub top: Option<usize>,

    /// At most N trees
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub limit: usize,

    /// Trees in words, or the whole boot in a format for another program
    #[arg(long, value_enum, default_value = "text")]
    pub format: TraceFormat,

    /// Write to this file instead of standard output
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `vmcs`
#[derive(Debug, Args)]
pub struct VmcsArgs {
    /// A trace of `./nvmx run --trace FILE`, and the number of an exit
    #[arg(value_name = "FILE@N")]
    pub place: String,

    /// Of this boot of the file [default: the one under nvmx]
    #[arg(long, value_name = "NAME")]
    pub boot: Option<String>,

    /// Only fields with this in their name
    #[arg(long, value_name = "TEXT")]
    pub field: Option<String>,
}

/// "L3" or "3"
fn level(text: &str) -> Result<u8, String> {
    let digits = text.trim_start_matches(['L', 'l']);
    digits.parse().ok().filter(|level| *level < 16).ok_or_else(|| "L2 or L3, say".into())
}

/// `stat`
#[derive(Debug, Args)]
pub struct StatArgs {
    /// A trace of `./nvmx run --trace FILE`; without one, L2 is booted under nvmx
    #[arg(value_name = "FILE", conflicts_with_all = ["l2", "l2_args", "bare", "live"])]
    pub file: Option<PathBuf>,

    /// Of this boot of the file [default: the one under nvmx]
    #[arg(long, value_name = "NAME", requires = "file")]
    pub boot: Option<String>,

    /// What runs as L2: as for `run`
    #[arg(long, value_name = "NAME|PATH", default_value = "cascade")]
    pub l2: String,

    /// The guest's command line
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    pub l2_args: String,

    /// L2 alone on the machine, without nvmx
    #[arg(long)]
    pub bare: bool,

    /// Show the table again and again while L2 runs
    #[arg(long)]
    pub live: bool,

    /// Who records
    #[command(flatten)]
    pub recorder: Recorder,

    /// How L2's VMREAD and VMWRITE reach nvmx
    #[arg(long, value_enum, default_value = "auto")]
    pub fields: Fields,

    /// Write the figures as JSON (docs/run-schema.md); `-` is standard output, which then has nothing else
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// The machine
    #[command(flatten)]
    pub l0: L0Args,
}

/// `lab`
#[derive(Debug, Args)]
pub struct LabArgs {
    /// Only these experiments, with their explanation
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,

    /// List the experiments and their claims, and stop
    #[arg(long)]
    pub list: bool,

    /// Print the constants of the model of cycles with their sources, and stop
    #[arg(long)]
    pub model: bool,

    /// Show the exits of one round of each row under nvmx as trees, instead of figures
    #[arg(long, conflicts_with_all = ["json", "report"])]
    pub trace: bool,

    /// Write claims, verdicts, tables and figures to this file too
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Write a page with a plot for each experiment
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,

    /// Record the figures in docs/lab-figures.json and make docs/lab.md anew
    #[arg(long)]
    pub bless: bool,

    /// The machine
    #[command(flatten)]
    pub l0: L0Args,
}

/// How refused VM entries and failed VMX instructions of L2 are reported.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Explain {
    /// In words, as they happen
    Text,
    /// One JSON object a line
    Json,
    /// Not at all
    Off,
}

/// The languages of templates.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Language {
    /// C and assembly, with a Makefile
    C,
    /// Rust with the kit of our own guests, with a Cargo.toml
    Rust,
}

/// What can be made anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum New {
    /// A guest hypervisor
    L2,
}

/// `new`
#[derive(Debug, Args)]
pub struct NewArgs {
    /// What to make
    #[arg(value_enum)]
    pub what: New,

    /// Where: a folder that does not exist, or is empty
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,

    /// In which language
    #[arg(long, value_enum, default_value = "c")]
    pub lang: Language,
}

/// `release`
#[derive(Debug, Args)]
pub struct ReleaseArgs {
    /// The archive; its checksum goes to FILE.sha256 beside it
    #[arg(value_name = "FILE.tar.gz")]
    pub file: PathBuf,
}

/// `explain`
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// `exit 48`, `error 7`, `field 0x6c14`, or a name: GuestRflagsReserved, EPT_VIOLATION, HOST_RSP, cpuid
    #[arg(value_name = "WORD", required = true)]
    pub words: Vec<String>,
}

/// `diff`
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// Only this guest of l2-guests/
    #[arg(long, value_name = "NAME")]
    pub l2: Option<String>,

    /// The guest's command line
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true, requires = "l2")]
    pub l2_args: String,

    /// Seed of the VMCS states that vmxtest generates
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub seed: u64,

    /// How many VMCS states vmxtest generates
    #[arg(long, value_name = "N", default_value_t = 250)]
    pub cases: u32,

    /// Run share K of a campaign on N machines: each share generates VMCS states of its own, and the first one also runs all
    /// that is not generated
    #[arg(long, value_name = "K/N")]
    pub shard: Option<Shard>,

    /// How L2's VMREAD and VMWRITE reach nvmx
    #[arg(long, value_enum, default_value = "auto")]
    pub fields: Fields,

    /// Write what was compared as JSON (docs/run-schema.md); `-` is standard output, which then has nothing else
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// The machine
    #[command(flatten)]
    pub l0: L0Args,
}

/// Between the seeds of two shares.
const SEEDS: u64 = 1_000_003;

impl DiffArgs {
    /// The command line of a guest: only `vmxtest` generates states.
    pub fn guest_args(&self, guest: &str) -> String {
        let mut words: Vec<String> = self.l2_args.split_whitespace().map(str::to_string).collect();
        if guest == "vmxtest" {
            let given = |key: &str| self.l2_args.split_whitespace().any(|word| word.starts_with(key));
            let shard = self.shard.unwrap_or(Shard { number: 1, of: 1 });
            let seed = self.seed.wrapping_add((shard.number as u64 - 1).wrapping_mul(SEEDS));
            if shard.number > 1 && !given("part=") {
                words.push("part=random".into());
            }
            let own = [("seed=", seed), ("cases=", shard.range(self.cases.into()).1)];
            let more: Vec<String> = own.iter().filter(|(k, _)| !given(k)).map(|(k, n)| format!("{k}{n}")).collect();
            words.extend(more);
        }
        words.join(" ")
    }
}

/// `bench`
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// The limits and the ledger
    #[arg(long, value_name = "FILE")]
    pub budget: Option<PathBuf>,

    /// Also measure how costs grow: with what L2 uses (guest `growth`), with processors, with nvmx in nvmx
    #[arg(long)]
    pub growth: bool,

    /// Instead measure what L3's boot costs on the usual stack, KVM, nvmx, Linux with KVM, Linux, against benches/stack.json
    #[arg(long, conflicts_with_all = ["growth", "compare", "json", "budget"])]
    pub stack: bool,

    /// With --stack: on 2 CPUs, and with L3 in QEMU and KVM in nvmx's place too, which takes many minutes
    #[arg(long, requires = "stack")]
    pub long: bool,

    /// With --stack: only the rows with this in their name, long ones too
    #[arg(long, value_name = "TEXT", requires = "stack", conflicts_with = "long")]
    pub row: Option<String>,

    /// Draw how they grow, on a page for a browser
    #[arg(long, value_name = "FILE.html", requires = "growth")]
    pub report: Option<PathBuf>,

    /// With `kvm`: measure guest `growth` with KVM in nvmx's place too
    #[arg(long, value_enum, default_value = "nvmx", requires = "growth", conflicts_with = "bless")]
    pub l1: L1,

    /// Write what is counted now into the file, in place of the figures that it has for this compiler
    #[arg(long, conflicts_with = "compare")]
    pub bless: bool,

    /// Show what changed since an earlier file of `run --json` or `bench --json`; other compilers, machines and emulators are
    /// refused
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,

    /// Write the figures as JSON (docs/run-schema.md); `-` is standard output, which then has nothing else
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// The machine
    #[command(flatten)]
    pub l0: L0Args,
}

/// `test`
#[derive(Debug, Args)]
pub struct TestArgs {
    /// Only boot tests with this in their name; may be given again
    #[arg(long, value_name = "TEXT")]
    pub filter: Vec<String>,

    /// Only the boot test of this name; may be given again
    #[arg(long, value_name = "NAME")]
    pub exact: Vec<String>,

    /// Skip boot tests with this in their name; may be given again
    #[arg(long, value_name = "TEXT")]
    pub exclude: Vec<String>,

    /// Also run the boot tests that take many minutes each; those that --filter or --exact select run without this option
    #[arg(long)]
    pub long: bool,

    /// Only a share of the boot tests: K of N, for N machines that together run each once
    #[arg(long, value_name = "K/N")]
    pub shard: Option<Shard>,

    /// Repeat the boots of a failed test up to N times; a test that passes only then is reported as such
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=9))]
    pub retry: u32,

    /// Write the results as JUnit XML, which CI programs read
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,

    /// Write the results as JSON (docs/run-schema.md); `-` is standard output, which then has nothing else
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Record every VM exit of the boots, each in a file NAME.trace of this folder, for `./nvmx trace`
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["list", "host_only"])]
    pub trace: Option<PathBuf>,

    /// List the boot tests that are selected, and stop; sets nothing up
    #[arg(long)]
    pub list: bool,

    /// Only tests that need no machine
    #[arg(long, conflicts_with_all = ["boot_only", "filter", "exact", "exclude", "shard", "list"])]
    pub host_only: bool,

    /// Only tests that boot
    #[arg(long)]
    pub boot_only: bool,

    /// How many boots run at the same time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub jobs: u32,

    /// What the boot tests run on: the emulated machine, or KVM, which has its own tests and runs them one after the other
    #[arg(long, value_enum, default_value = "bochs")]
    pub l0: L0,

    /// Use this Bochs instead of building one
    #[arg(long, value_name = "PATH")]
    pub bochs: Option<PathBuf>,
}

/// `fuzz`
#[derive(Debug, Args)]
pub struct FuzzArgs {
    /// Only these targets of tests/fuzz/
    #[arg(value_name = "TARGET")]
    pub targets: Vec<String>,

    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    pub seconds: u32,

    /// Seed of the random choices of every target; without it each run makes other choices
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub seed: Option<u32>,

    /// Only a share of the targets: K of N, for N machines
    #[arg(long, value_name = "K/N", conflicts_with = "input")]
    pub shard: Option<Shard>,

    /// How many targets run at the same time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub jobs: u32,

    /// Run one target on this input only, to reproduce a failure
    #[arg(long, value_name = "FILE", conflicts_with = "keep")]
    pub input: Option<PathBuf>,

    /// Minimize tests/fuzz/corpus: keep the fewest inputs that cover what it and the newly found inputs cover
    #[arg(long)]
    pub keep: bool,
}

/// `doctor`
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// What would run nvmx
    #[arg(long, value_enum, default_value = "auto")]
    pub l0: L0,

    /// Look at this Bochs
    #[arg(long, value_name = "PATH")]
    pub bochs: Option<PathBuf>,

    /// Also boot, and put all that a maintainer needs, and nothing private, into one archive (FILE.tar.gz)
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

/// `bochs`
#[derive(Debug, Args)]
pub struct BochsArgs {
    /// Write a unified patch against the source of Bochs 3.0 to this file, for `patch -p1`; `-` is standard output
    #[arg(long, value_name = "FILE")]
    pub patch: Option<PathBuf>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u64>() {
        Ok(0) | Err(_) => Err("a number of seconds above 0 is expected".into()),
        Ok(n) => Ok(Duration::from_secs(n)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn seed_and_cases_reach_the_guest_that_generates_states() {
        let Ok(Cli { command: Cmd::Diff(diff), .. }) =
            Cli::try_parse_from(["nvmx", "diff", "--seed", "7", "--cases", "9"])
        else {
            panic!("not diff")
        };
        assert_eq!(diff.guest_args("vmxtest"), "seed=7 cases=9");
        assert_eq!(diff.guest_args("cascade"), "");
        let share = ["nvmx", "diff", "--cases", "10", "--shard", "3/3"];
        let Ok(Cli { command: Cmd::Diff(diff), .. }) = Cli::try_parse_from(share) else { panic!("not diff") };
        assert_eq!(diff.guest_args("vmxtest"), "part=random seed=2000007 cases=4");
        assert!(Cli::try_parse_from(["nvmx", "diff", "--l2-args", "part=modes"]).is_err());
    }

    #[test]
    fn options_have_the_documented_defaults() {
        let cli = Cli::try_parse_from(["nvmx", "run", "--fields", "trapped", "--json", "x.json", "--verbose"]).unwrap();
        assert!(cli.verbose);
        let Cmd::Run(run) = cli.command else { panic!("not run") };
        assert_eq!((run.l2.as_str(), run.fields, run.l0.l0), ("cascade", Fields::Trapped, L0::Auto));
        assert_eq!((run.l0.memory, run.l0.cpus, run.l0.timeout), (256, 1, None));
        assert_eq!(run.depth, 1);
        assert!(Cli::try_parse_from(["nvmx", "run", "--depth", "0"]).is_err());
        assert!(Cli::try_parse_from(["nvmx", "run", "--timeout", "0"]).is_err());
        assert!(Cli::try_parse_from(["nvmx"]).is_err());
    }
}
