//! How far a boot has come, in time that a loaded host does not stretch: the emulated machine's instructions where the emulator
//! tells them, else the CPU time of its process.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The file in a boot's folder in which our build of Bochs keeps its count of ticks, and then 1 once its only processor has
/// halted for good, with interrupts off: two words of eight bytes, the lowest first.
pub const TICKS: &str = "ticks";
/// Instructions that a second of [`Time`] stands for: what the emulated machine makes of its own clock.
pub const PER_SECOND: u64 = 100_000_000;
/// A machine that makes no progress for this long, by the clock on the wall, is stuck.
const STUCK: Duration = Duration::from_secs(300);
/// The last resort: this many times the limit, by the clock on the wall.
const PATIENCE: u32 = 20;

/// What a boot has used up.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Debug)]
pub enum Time {
    /// CPU time of the emulator's process
    Cpu(Duration),
    /// Emulated instructions, and what the machine skipped while it was halted: goes before CPU time
    Instructions(u64),
}

impl Time {
    /// As the limit counts it.
    pub fn as_limit(self) -> Duration {
        match self {
            Time::Instructions(n) => Duration::from_nanos(n.saturating_mul(1_000_000_000 / PER_SECOND)),
            Time::Cpu(time) => time,
        }
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.as_limit().as_secs_f64();
        match self {
            Time::Instructions(n) => {
                write!(f, "{seconds:.0} s of the machine's time ({} instructions)", crate::text::grouped(*n))
            }
            Time::Cpu(_) => write!(f, "{seconds:.0} s of CPU time"),
        }
    }
}

/// Why a boot was ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Over {
    /// It used up what it may
    Limit(Time),
    /// It got no further for so long
    Stuck(Duration),
    /// The last resort
    Wall(Duration),
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Over::Limit(time) => write!(f, "it did not end within {time}"),
            Over::Stuck(time) => write!(f, "it did not end: the machine got no further for {} s", time.as_secs()),
            Over::Wall(time) => write!(f, "it did not end within {} s by the clock on the wall", time.as_secs()),
        }
    }
}

/// The clock of one boot.
pub struct Clock {
    process: u32,
    ticks: PathBuf,
    start: Instant,
    last: Option<Time>,
    moved: Instant,
    /// When it was first seen halted
    halted: Option<Duration>,
}

impl Clock {
    /// The clock of the machine that this process emulates, with its files in `folder`.
    pub fn start(process: u32, folder: &Path) -> Self {
        let now = Instant::now();
        Clock { process, ticks: folder.join(TICKS), start: now, last: None, moved: now, halted: None }
    }

    /// What was used up so far: the last that could be read.
    pub fn read(&mut self) -> Option<Time> {
        let now = ticks(&self.ticks).map(Time::Instructions).or_else(|| cpu_time(self.process).map(Time::Cpu));
        // A process that has just ended has no time any more.
        if now > self.last || self.last.is_none() {
            if now.is_some() {
                self.moved = Instant::now();
            }
            self.last = now;
        }
        self.last
    }

    /// Whether the machine's only processor has halted for good, and its serial line has had the time to say so.
    pub fn halted(&mut self) -> bool {
        const DRAINED: Duration = Duration::from_millis(200);
        let Some([ticks, _]) = words(&self.ticks).filter(|[_, halted]| *halted != 0) else { return false };
        let now = Time::Instructions(ticks).as_limit();
        now.saturating_sub(*self.halted.get_or_insert(now)) >= DRAINED
    }

    /// Whether the boot has gone on for too long.
    pub fn over(&mut self, limit: Duration) -> Option<Over> {
        let time = self.read();
        let (still, wall) = (self.moved.elapsed(), self.start.elapsed());
        match time {
            Some(time) if time.as_limit() >= limit => Some(Over::Limit(time)),
            _ if still >= STUCK.max(limit) => Some(Over::Stuck(still)),
            _ if wall >= limit.saturating_mul(PATIENCE).max(STUCK) => Some(Over::Wall(wall)),
            _ => None,
        }
    }
}

/// The words in the file, if the emulator has written them.
fn words(file: &Path) -> Option<[u64; 2]> {
    let bytes: [u8; 16] = std::fs::read(file).ok()?.try_into().ok()?;
    let bits = u128::from_le_bytes(bytes);
    Some([bits as u64, (bits >> 64) as u64])
}

fn ticks(file: &Path) -> Option<u64> {
    words(file).map(|[ticks, _]| ticks).filter(|&n| n > 0)
}

/// User and system time of a process.
fn cpu_time(process: u32) -> Option<Duration> {
    of_stat(&std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?)
}

/// From the text of `/proc/PID/stat`, whose second word may contain anything but ends in the last `)`.
fn of_stat(text: &str) -> Option<Duration> {
    let mut words = text.rsplit_once(") ")?.1.split(' ').skip(11);
    let mut number = || words.next()?.parse::<u64>().ok();
    let clock_ticks = number()?.saturating_add(number()?);
    // Linux reports 100 a second to programs, whatever it uses itself.
    Some(Duration::from_millis(clock_ticks.saturating_mul(10)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_user_and_system_time_whatever_the_program_is_called() {
        let text = "7 (a) b) (c) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20";
        assert_eq!(of_stat(text), Some(Duration::from_secs(3)));
        assert_eq!(of_stat("nonsense"), None);
        assert!(cpu_time(std::process::id()).is_some());
    }

    #[test]
    fn the_emulators_count_goes_before_cpu_time_and_is_the_limit_on_a_loaded_machine() {
        let folder = tempfile::tempdir().unwrap();
        let mut clock = Clock::start(std::process::id(), folder.path());
        assert!(matches!(clock.read(), Some(Time::Cpu(_))));
        assert_eq!(clock.over(Duration::from_secs(1000)), None);
        // The emulator begins to count after its start.
        write(folder.path(), 7, 0);
        assert_eq!(clock.read(), Some(Time::Instructions(7)));
        write(folder.path(), 5 * PER_SECOND, 0);
        let mut clock = Clock::start(std::process::id(), folder.path());
        let five = Time::Instructions(5 * PER_SECOND);
        assert_eq!(clock.read(), Some(five));
        assert_eq!(clock.over(Duration::from_secs(6)), None);
        assert_eq!(clock.over(Duration::from_secs(5)), Some(Over::Limit(five)));
        let text = Over::Limit(five).to_string();
        assert_eq!(text, "it did not end within 5 s of the machine's time (500,000,000 instructions)");
    }

    #[test]
    fn a_count_that_is_not_whole_or_not_begun_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(TICKS);
        for bytes in [&b""[..], &[1, 2, 3], &[0; 16]] {
            std::fs::write(&file, bytes).unwrap();
            assert_eq!(ticks(&file), None);
        }
    }

    fn write(folder: &Path, ticks: u64, halted: u64) {
        let bytes: Vec<u8> = [ticks, halted].iter().flat_map(|word| word.to_le_bytes()).collect();
        std::fs::write(folder.join(TICKS), bytes).unwrap();
    }

    #[test]
    fn a_halt_for_good_counts_once_the_serial_line_is_drained() {
        let folder = tempfile::tempdir().unwrap();
        let mut clock = Clock::start(std::process::id(), folder.path());
        assert!(!clock.halted());
        for (ticks, halted, expected) in
            [(1, 0, false), (PER_SECOND, 1, false), (PER_SECOND + 1, 1, false), (2 * PER_SECOND, 1, true)]
        {
            write(folder.path(), ticks, halted);
            assert_eq!(clock.halted(), expected);
        }
    }

    #[test]
    fn a_machine_that_is_gone_keeps_its_last_time_and_is_over_by_the_wall() {
        let folder = tempfile::tempdir().unwrap();
        let mut clock = Clock::start(u32::MAX, folder.path());
        assert_eq!(clock.read(), None);
        clock.last = Some(Time::Cpu(Duration::from_secs(1)));
        assert_eq!(clock.read(), Some(Time::Cpu(Duration::from_secs(1))));
        let Some(long_ago) = Instant::now().checked_sub(STUCK * 3) else { return };
        clock.start = long_ago;
        assert!(matches!(clock.over(Duration::from_secs(10)), Some(Over::Wall(_))));
        clock.moved = long_ago;
        assert!(matches!(clock.over(Duration::from_secs(10)), Some(Over::Stuck(_))));
    }
}
