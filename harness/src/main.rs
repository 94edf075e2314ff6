//! `./nvmx`: builds, boots, tests and measures.
//!
//! Each module uses only those above it (`tests/layers.rs` of the workspace holds that):
//!
//! - `text` writes figures, `clock` tells how far a boot has come, `shard` is a share of the work;
//! - `image` builds what boots, `backend` starts machines, `trace` knows every exit of a boot;
//! - `transcript` reads a serial line, `boot` runs one boot from start to verdict, `clamp` makes two boots see the same
//!   capabilities;
//! - `cli` is the command line, `session` a machine that is set up, `report` makes figures of records, `sweep` has the boots
//!   that show how costs grow, `l2` builds what the user brings;
//! - `lab` has the experiments of `./nvmx lab`, `suite` the boot tests, `cmd` the subcommands.
//!
//! The crate `nvmx-setup` finds or makes the tools, and knows nothing of boots.

mod backend;
mod boot;
mod clamp;
mod cli;
mod clock;
mod cmd;
mod image;
mod l2;
mod lab;
mod report;
mod session;
mod shard;
mod suite;
mod sweep;
mod text;
mod trace;
mod transcript;

use clap::Parser;
use cli::{Cli, Cmd};
use nvmx_setup::{error, proc, ui};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut ui = ui::Ui::new(cli.verbose);
    ui.json_refusals = matches!(&cli.command, Cmd::Run(args) if args.explain == cli::Explain::Json);
    let result = proc::install_handler().and_then(|()| match &cli.command {
        Cmd::Run(args) => cmd::run::run(&ui, args),
        Cmd::Test(args) => cmd::test::run(&ui, args),
        Cmd::Diff(args) => cmd::diff::run(&ui, args),
        Cmd::Fuzz(args) => cmd::fuzz::run(&ui, args),
        Cmd::Doctor(args) => cmd::doctor::run(&ui, args),
        Cmd::Explain(args) => cmd::explain::run(&ui, args),
        Cmd::Release(args) => cmd::release::run(&ui, args),
        Cmd::Trace(args) => cmd::trace::run(&ui, args),
        Cmd::Vmcs(args) => cmd::vmcs::run(&ui, args),
        Cmd::Stat(args) => cmd::stat::run(&ui, args),
        Cmd::New(args) => cmd::new::run(&ui, args),
        Cmd::Toolchain => cmd::toolchain::run(&ui),
        Cmd::Lab(args) => cmd::lab::run(&ui, args),
        Cmd::Bench(args) => cmd::bench::run(&ui, args),
        Cmd::Bochs(args) => cmd::bochs::run(&ui, args),
    });
    match result {
        Ok(()) => match ui.stdout_failure() {
            None => ExitCode::SUCCESS,
            Some(error) => {
                ui.note(&format!("nvmx: cannot write standard output: {error}"));
                ExitCode::FAILURE
            }
        },
        Err(_) if proc::interrupted() => {
            ui.note("nvmx: interrupted");
            ExitCode::from(130)
        }
        Err(error) => {
            ui.note(&format!("nvmx: {error:#}"));
            error::exit_code(&error)
        }
    }
}
