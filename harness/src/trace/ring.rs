//! nvmx's own trace, as it tells it on the serial line at the end, brought into the form of the emulator's log.
//!
//! It has the last exits of each CPU. Of the fields it has only the processor-based controls, and it has nothing about what guest hypervisors do.

use super::log::{Counts, Facts, Record, What};
use l2_protocol::trace::{TracedExit, Words};
use l2_protocol::{Kind, OwnedRecord};
use nvmx::vmx::Field;
use std::collections::{BTreeMap, VecDeque};

/// What a VMCS is called that runs L2 and was not seen: no page has this address.
const UNSEEN: u64 = 1;

/// The records of all CPUs in the order in which they came, and how many exits there were; `None` if nvmx told of none.
pub fn records<'a>(said: impl Iterator<Item = &'a OwnedRecord>) -> Option<(Vec<Record>, u64)> {
    let mut exits: BTreeMap<u32, BTreeMap<u64, TracedExit>> = BTreeMap::new();
    let (mut written, mut any) = (0, false);
    for record in said.filter(|record| record.kind == Kind::Trace) {
        any = true;
        written += record.number("written").unwrap_or(0);
        if let Some((cpu, number, exit)) = exit(record) {
            exits.entry(cpu).or_default().insert(number, exit);
        }
    }
    let queues = exits.into_iter().map(|(cpu, exits)| of_cpu(cpu, &exits));
    any.then(|| (merged(queues.collect()), written))
}

fn exit(record: &OwnedRecord) -> Option<(u32, u64, TracedExit)> {
    let words = Words::parse(record.get("words")?)?;
    Some((record.number("cpu").ok()?.try_into().ok()?, record.number("n").ok()?, TracedExit::of(words)))
}

fn of_cpu(cpu: u32, exits: &BTreeMap<u64, TracedExit>) -> VecDeque<Record> {
    let mut list = VecDeque::new();
    let Some(first) = exits.values().next() else { return list };
    let at = |tick, vmcs, what| Record { tick, vmcs, cpu, executed: tick as u32, what };
    // The VMCS of L2 comes first on each CPU: by that levels are known. In what is kept it may come later, or never.
    let of_l2 = exits.values().find_map(|exit| match (exit.level, exit.next_level) {
        (2, _) => Some(exit.vmcs),
        (_, 2) => Some(exit.next_vmcs),
        _ => None,
    });
    list.push_back(at(first.exited, of_l2.unwrap_or(UNSEEN), What::Entry(Facts::default())));
    let mut controls: BTreeMap<u64, [u32; 2]> = BTreeMap::new();
    let mut counts = Counts::default();
    for exit in exits.values() {
        let now = [exit.primary, exit.secondary];
        if controls.insert(exit.vmcs, now) != Some(now) {
            let fields = [Field::CPU_BASED_VM_EXEC_CONTROL, Field::SECONDARY_VM_EXEC_CONTROL];
            let values = fields.iter().zip(now).map(|(field, value)| (field.encoding(), value.into()));
            list.push_back(at(exit.exited, exit.vmcs, What::Fields(values.collect())));
        }
        list.push_back(at(exit.exited, exit.vmcs, What::Exit(left(exit, counts))));
        counts = counts.plus(work(exit));
        if exit.entered != 0 {
            let facts = Facts { event: exit.injected, rip: exit.next_rip, counts, ..Facts::default() };
            list.push_back(at(exit.entered, exit.next_vmcs, What::Entry(facts)));
        }
    }
    list
}

fn left(exit: &TracedExit, counts: Counts) -> Facts {
    let [rax, rcx, rdx] = exit.registers;
    Facts {
        reason: exit.reason,
        event: exit.event,
        rip: exit.rip,
        qualification: exit.qualification,
        address: exit.address,
        rax,
        rcx,
        rdx,
        vectoring: exit.vectoring,
        info: exit.info,
        mode: 1 << 8,
        counts,
        ..Facts::default()
    }
}

fn work(exit: &TracedExit) -> Counts {
    let [vmread, vmwrite, vmptrld, vmclear, invept, invvpid] = exit.counts;
    let (vmread, vmwrite) = (vmread.into(), vmwrite.into());
    Counts { vmread, vmwrite, vmptrld, vmclear, invept, invvpid, ..Counts::default() }
}

/// One after the other by time; each CPU's own stay in their order.
fn merged(mut queues: Vec<VecDeque<Record>>) -> Vec<Record> {
    let mut all = Vec::new();
    while let Some(next) = queues.iter_mut().filter(|q| !q.is_empty()).min_by_key(|q| q.front().map(|r| r.tick)) {
        all.extend(next.pop_front());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::tree::{Builder, Next, tests::nested};
    use super::*;
    use nvmx::vmx::exit::BasicReason as R;

    const L2: (u8, u64) = (2, 0x1000);
    const L3: (u8, u64) = (3, 0x2000);

    fn exit(from: (u8, u64), reason: R, to: (u8, u64), at: u64) -> TracedExit {
        TracedExit {
            exited: at,
            entered: at + 10,
            level: from.0,
            vmcs: from.1,
            next_level: to.0,
            next_vmcs: to.1,
            reason: reason.0.into(),
            rip: 0x100 + at,
            next_rip: 0x200 + at,
            counts: [4, 1, 0, 0, 0, 0],
            ..TracedExit::default()
        }
    }

    fn told(cpu: u32, from: u64, exits: &[TracedExit]) -> Vec<OwnedRecord> {
        let head = format!("@L1 trace cpu={cpu} written={} kept={}", from + exits.len() as u64, exits.len());
        let line = |(n, exit): (u64, &TracedExit)| format!("@L1 trace cpu={cpu} n={n} words=\"{}\"", exit.words());
        let lines = (from..).zip(exits).map(line);
        std::iter::once(head).chain(lines).map(|line| OwnedRecord::parse(&line).unwrap()).collect()
    }

    /// A CPUID of L3 that L2 handles.
    fn cpuid(at: u64) -> [TracedExit; 2] {
        [exit(L3, R::CPUID, L2, at), exit(L2, R::VMRESUME, L3, at + 50)]
    }

    #[test]
    fn what_nvmx_tells_becomes_trees_although_the_ring_begins_in_the_middle() {
        let lines = told(0, 900, &[&cpuid(100)[..], &cpuid(200)].concat());
        let (records, written) = records(lines.iter()).unwrap();
        assert_eq!(written, 904);
        let built = Builder::of(nested(), records);
        let roots: Vec<u32> = built.roots().collect();
        assert_eq!(roots, [0, 2]);
        let tree = &built.exits[0];
        assert_eq!((tree.level, tree.cost, tree.root_ticks, tree.root.vmread), (3, Some(60), 10, 4));
        assert_eq!((tree.next, tree.handler_ticks()), (Next::Reflected { level: 2, rip: 0x264 }, 40));
        assert_eq!(built.exits[1].next, Next::Entered { level: 3 });
    }

    #[test]
    fn each_cpu_has_trees_of_its_own_whatever_the_others_do_meanwhile() {
        let lines = [told(1, 0, &cpuid(105)), told(0, 0, &cpuid(100)), told(2, 0, &[])].concat();
        let (records, _) = records(lines.iter()).unwrap();
        assert!(records.windows(2).all(|pair| pair[0].tick <= pair[1].tick));
        let built = Builder::of(nested(), records);
        let trees: Vec<(u32, usize)> =
            built.roots().map(|root| (built.exits[root as usize].cpu, built.tree(root).len())).collect();
        assert_eq!(trees, [(0, 2), (1, 2)]);
    }

    #[test]
    fn the_last_exit_is_open_and_no_word_is_no_trace() {
        let last = TracedExit { entered: 0, ..exit(L2, R::IO_INSTRUCTION, (0, 0), 500) };
        let (records, _) = records(told(0, 3, &[last]).iter()).unwrap();
        let built = Builder::of(nested(), records);
        assert_eq!((built.exits.len(), built.exits[0].level, built.exits[0].next), (1, 2, Next::Open));
        assert_eq!(super::records(std::iter::empty()), None);
        let (none, _) = super::records(told(0, 0, &[]).iter()).unwrap();
        assert!(none.is_empty());
    }
}
