//! What nvmx counted, if it is below this Linux: its counters are CPUID leaves, which programs may read with `counters=all`
//! on nvmx's command line, each CPU's on that CPU.

use l2_protocol::abi::{
    Counter, EXITS_OF_L2, EXITS_OF_L3, FRAMES_FREE, LEAF_COUNTERS, LEAF_SIGNATURE, REASONS, SIGNATURE, SNAPSHOT,
};
use raw_cpuid::native_cpuid::cpuid_count;

/// How many of nvmx's frames are free, those of all CPUs together.
pub fn free_frames() -> Option<u64> {
    let mut sum = 0;
    present().then(|| on_each_cpu(|| sum += value(FRAMES_FREE)))?;
    Some(sum)
}

/// One value.
fn value(index: u32) -> u64 {
    let leaf = cpuid_count(LEAF_COUNTERS, index);
    u64::from(leaf.edx) << 32 | u64::from(leaf.eax)
}

/// The counters at one moment; all zero where there is no nvmx.
#[derive(Clone)]
pub struct Counters {
    named: Vec<u64>,
    l2: Vec<u64>,
    l3: Vec<u64>,
}

/// Whether nvmx runs this Linux.
pub fn present() -> bool {
    let leaf = cpuid_count(LEAF_SIGNATURE, 0);
    [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat() == SIGNATURE
}

impl Counters {
    /// Reads them all, of all CPUs together, if there are any.
    pub fn read() -> Option<Self> {
        if !present() {
            return None;
        }
        let mut sum: Option<Self> = None;
        on_each_cpu(|| {
            let here = Self::of_this_cpu();
            match &mut sum {
                Some(sum) => sum.add(&here),
                None => sum = Some(here),
            }
        });
        sum
    }

    fn of_this_cpu() -> Self {
        cpuid_count(LEAF_COUNTERS, SNAPSHOT);
        let reasons = |first: u32| (first..).take(REASONS).map(value).collect();
        Counters {
            named: Counter::ALL.iter().map(|c| value(*c as u32)).collect(),
            l2: reasons(EXITS_OF_L2),
            l3: reasons(EXITS_OF_L3),
        }
    }

    fn add(&mut self, other: &Self) {
        let lists = [(&mut self.named, &other.named), (&mut self.l2, &other.l2), (&mut self.l3, &other.l3)];
        for (mine, theirs) in lists {
            mine.iter_mut().zip(theirs).for_each(|(mine, their)| *mine += their);
        }
    }

    /// What happened between two moments, by name.
    pub fn between<'a>(&'a self, to: &'a Self) -> impl Iterator<Item = (&'static str, u64)> + 'a {
        let pairs = Counter::ALL.iter().zip(&self.named).zip(&to.named);
        pairs.map(|((counter, from), to)| (counter.name(), to.saturating_sub(*from)))
    }

    /// The same as fields of a record.
    pub fn fields(&self, to: &Self) -> String {
        self.between(to).map(|(name, count)| format!(" {name}={count}")).collect()
    }

    /// Exits by basic exit reason between two moments, of L2 and of L3, as `reason:count`, the most frequent first.
    pub fn reasons(&self, to: &Self) -> [String; 2] {
        [pairs(&self.l2, &to.l2), pairs(&self.l3, &to.l3)]
    }
}

/// Runs it on each CPU that this thread may use, and lets the thread go where it could before.
fn on_each_cpu(mut work: impl FnMut()) {
    // SAFETY: a set of CPUs is plain bits, all of which may be 0.
    let mut before: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: the pointer is to a set of the size that is given.
    if unsafe { libc::sched_getaffinity(0, size, &mut before) } != 0 {
        return work();
    }
    for cpu in 0..libc::CPU_SETSIZE as usize {
        // SAFETY: the number is below the set's size.
        if !unsafe { libc::CPU_ISSET(cpu, &before) } {
            continue;
        }
        // SAFETY: as above.
        let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: the number is below the set's size.
        unsafe { libc::CPU_SET(cpu, &mut one) };
        // SAFETY: the pointer is to a set of the size that is given.
        if unsafe { libc::sched_setaffinity(0, size, &one) } == 0 {
            work();
        }
    }
    // SAFETY: as above. A set that was right before is right now.
    unsafe { libc::sched_setaffinity(0, size, &before) };
}

fn pairs(from: &[u64], to: &[u64]) -> String {
    let mut counts: Vec<(usize, u64)> = from.iter().zip(to).map(|(a, b)| b.saturating_sub(*a)).enumerate().collect();
    counts.retain(|(_, count)| *count > 0);
    counts.sort_by_key(|(reason, count)| (u64::MAX - count, *reason));
    counts.iter().map(|(reason, count)| format!("{reason}:{count}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_of_cpus_are_added() {
        let mut sum = Counters { named: vec![1, 2], l2: vec![3], l3: vec![4] };
        sum.add(&Counters { named: vec![10, 20], l2: vec![30], l3: vec![40] });
        assert_eq!((sum.named, sum.l2, sum.l3), (vec![11, 22], vec![33], vec![44]));
        let mut times = 0;
        on_each_cpu(|| times += 1);
        assert!(times >= 1);
    }

    #[test]
    fn what_lies_between_two_moments_is_told_by_name_and_by_reason() {
        let at = |exits: u64| Counters {
            named: vec![exits; Counter::ALL.len()],
            l2: vec![0, exits, 2 * exits],
            l3: vec![7; 3],
        };
        let (from, to) = (at(10), at(15));
        assert!(from.fields(&to).starts_with(" hw_exits=5 exits_l2=5 "), "{}", from.fields(&to));
        assert_eq!(from.reasons(&to), ["2:10 1:5", ""]);
    }
}
