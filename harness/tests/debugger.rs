//! `./nvmx run --gdb` as somebody uses it: a boot that waits, and gdb in another terminal. It builds a second emulator, so it runs
//! only if it is asked for: `cargo test -p nvmx-harness --test debugger -- --ignored`.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

/// What is typed in gdb.
const TYPED: &str = "nvmx where\nnvmx regs L2\nnvmx walk L3 $pc\nnvmx x L3 $pc 4\nnvmx break L2 kit_exited\ncontinue\nnvmx where\n\
                     nvmx vmcs L3 0x4402\nkill\n";

#[test]
#[ignore = "builds an emulator with a gdb stub: some minutes"]
fn gdb_stops_in_l3_walks_its_memory_and_breaks_in_l2() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut run = Command::new(env!("CARGO_BIN_EXE_nvmx-harness"));
    let mut run = run.args(["run", "--gdb", "L3"]).current_dir(&root).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(run.stdout.take().unwrap()).lines().map_while(Result::ok);
    let waits = lines.find(|line| line.contains("gdb -q -x ")).expect("a line that says what to type");
    let file = waits.rsplit_once("-x ").unwrap().1;

    let typed = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&typed, TYPED).unwrap();
    let gdb = Command::new("gdb").args(["-q", "-batch", "-x", file, "-x"]).arg(typed.path()).output().expect("gdb");
    let said = String::from_utf8_lossy(&gdb.stdout);
    let rest: Vec<String> = lines.collect();
    assert!(run.wait().unwrap().success(), "{rest:?}\n{said}");

    let in_order = [
        "L3 runs at 0x",
        "runs L2, left at 0x",
        "efer",
        "ept12, level 4: entry 0 at 0x",
        "paging, level 4: entry 0 at 0x",
        "is physical 0x",
        "by ept12 (0x",
        "Breakpoint 1 at 0x",
        "in kit_exited ()",
        "L2 runs at 0x",
        // VMCALL is what L3 exits by first.
        ": 0x12\n",
    ];
    let mut from = 0;
    for text in in_order {
        let found = said[from..].find(text).unwrap_or_else(|| panic!("no `{text}` where it belongs:\n{said}"));
        from += found + text.len();
    }
}
