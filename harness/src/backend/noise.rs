//! What about a host makes time an uncertain measure of work: other programs on the same cores, and frequencies that change.

use std::path::Path;
use std::time::Duration;

/// A CPU that is busy for more than this share of time disturbs the one that shares its core.
const BUSY: f64 = 0.1;
/// For how long the other CPUs are looked at.
const LOOK: Duration = Duration::from_millis(200);

/// What about this host makes time an uncertain measure of work: a line each, for the CPUs that the machine runs on.
pub fn warnings(cpus: &[u32]) -> Vec<String> {
    let before = busy_times();
    std::thread::sleep(LOOK);
    let busy = busy_cpus(&before, &busy_times());
    found(Path::new("/sys/devices/system/cpu"), cpus, &busy)
}

fn busy_times() -> String {
    std::fs::read_to_string("/proc/stat").unwrap_or_default()
}

/// The CPUs that were busy between two states of `/proc/stat`.
///
/// Source: Linux manual pages, proc_stat(5).
fn busy_cpus(before: &str, after: &str) -> Vec<u32> {
    let times = |text: &str, cpu: &str| -> Option<(u64, u64)> {
        let line = text.lines().find(|line| line.split(' ').next() == Some(cpu))?;
        let times: Vec<u64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
        // Idle, and idle with input or output under way.
        Some((times.iter().take(8).sum(), times.get(3)? + times.get(4)?))
    };
    let cpus = after.lines().filter_map(|line| line.split(' ').next()?.strip_prefix("cpu")?.parse::<u32>().ok());
    cpus.filter(|cpu| {
        let name = format!("cpu{cpu}");
        let (Some(from), Some(to)) = (times(before, &name), times(after, &name)) else { return false };
        let (all, idle) = (to.0.saturating_sub(from.0), to.1.saturating_sub(from.1));
        all > 0 && all.saturating_sub(idle) as f64 > all as f64 * BUSY
    })
    .collect()
}

fn found(root: &Path, cpus: &[u32], busy: &[u32]) -> Vec<String> {
    let read = |cpu: u32, file: &str| {
        let text = std::fs::read_to_string(root.join(format!("cpu{cpu}/{file}"))).ok()?;
        Some(text.trim().to_string())
    };
    let mut lines = Vec::new();
    for &cpu in cpus {
        if let Some(governor) = read(cpu, "cpufreq/scaling_governor").filter(|g| g != "performance") {
            lines.push(format!(
                "CPU {cpu} changes its frequency (governor {governor}): cpupower frequency-set -g performance"
            ));
        }
        if busy.contains(&cpu) {
            lines.push(format!("CPU {cpu} is busy with something else"));
        }
        let siblings = read(cpu, "topology/thread_siblings_list").map_or(Vec::new(), |list| numbers(&list));
        for sibling in siblings.into_iter().filter(|other| *other != cpu && busy.contains(other)) {
            lines.push(format!("CPU {sibling}, which shares a core with CPU {cpu}, is busy"));
        }
    }
    if std::fs::read_to_string(root.join("intel_pstate/no_turbo")).is_ok_and(|text| text.trim() == "0") {
        lines.push("turbo is on: the frequency follows heat and load".into());
    }
    lines
}

/// The numbers of a list like `0-3,8`.
pub fn numbers(list: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (first, last) = part.trim().split_once('-').unwrap_or((part.trim(), part.trim()));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_cpus_is_read() {
        assert_eq!(numbers("\t0-2,7,9-10"), [0, 1, 2, 7, 9, 10]);
        assert!(numbers("").is_empty());
    }

    #[test]
    fn a_busy_sibling_and_a_governor_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("cpu3/cpufreq/scaling_governor", "powersave\n");
        write("cpu3/topology/thread_siblings_list", "1,3\n");
        write("intel_pstate/no_turbo", "0\n");
        let before = "cpu  0 0 0 0 0\ncpu1 10 0 0 90 0 0 0 0\ncpu3 10 0 0 90 0 0 0 0\n";
        let after = "cpu  0 0 0 0 0\ncpu1 30 0 0 100 0 0 0 0\ncpu3 10 0 0 120 0 0 0 0\n";
        let busy = busy_cpus(before, after);
        assert_eq!(busy, [1]);
        let text = found(folder.path(), &[3], &busy).join("\n");
        assert!(
            text.contains("governor powersave") && text.contains("CPU 1, which shares a core with CPU 3"),
            "{text}"
        );
        assert!(text.contains("turbo is on") && !text.contains("CPU 3 is busy"), "{text}");
        assert!(found(folder.path(), &[2], &[]).join("\n").contains("turbo"));
    }
}
