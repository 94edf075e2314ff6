//! What people run in a guest, one kind after the other: programs that start and end, memory, system calls, a pipe, a timer,
//! interrupts between CPUs. Each is a fixed amount of work and a record with its length, and a check of what came out.

use crate::console::Console;
use crate::facts::{cpus, record, ticks};
use anyhow::{Context, Result, ensure};
use l2_protocol::{Kind, Level};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// The argument with which this program is started as a child that does a little and ends.
pub const CHILD: &str = "child";
/// What such a child returns.
const RETURNED: i32 = 7;
const PAGE: usize = 4096;
const PROGRAMS: u64 = 40;
const CHILD_PAGES: usize = 64;
/// Pages that are taken and given back so many times.
const PAGES: usize = 8192;
const TIMES: u64 = 5;
const SWEEPS: u64 = 1000;
const SYSTEM_CALLS: u64 = 500_000;
const MESSAGES: u64 = 4000;
const TIMER: libc::suseconds_t = 1000;
const TURNS: u64 = 20_000_000;
const BARRIERS: u64 = 2000;

/// A load: its name, how often it does its work, and the work, which returns what must be the same on every machine.
type Load = (&'static str, u64, fn() -> Result<u64>);

/// All of them. The last needs two CPUs.
const LOADS: [Load; 7] = [
    ("load_programs", PROGRAMS, programs),
    ("load_faults", PAGES as u64 * TIMES, faults),
    ("load_sweep", SWEEPS, sweep),
    ("load_calls", SYSTEM_CALLS, calls),
    ("load_pipe", MESSAGES, pipe),
    ("load_timer", TURNS, timer),
    ("load_barriers", BARRIERS, barriers),
];

/// Does them all.
///
/// # Errors
/// What Linux refuses.
pub fn run(console: &mut Console) -> Result<()> {
    let loads = &LOADS[..if cpus() > 1 { LOADS.len() } else { LOADS.len() - 1 }];
    for (name, count, work) in loads {
        let start = ticks();
        let result = work().context(*name)?.to_string();
        let (took, count) = ((ticks() - start).to_string(), count.to_string());
        record(console, Level::L3, Kind::Event, &[("name", name), ("count", &count), ("ticks", &took)]);
        record(console, Level::L3, Kind::Check, &[("name", name), ("result", &result)]);
    }
    Ok(())
}

/// The child: touches some memory and says how it went.
pub fn child() -> i32 {
    if touch(CHILD_PAGES).is_ok() { RETURNED } else { 1 }
}

/// Programs that are started, touch memory, and end.
fn programs() -> Result<u64> {
    let mut sum = 0;
    for _ in 0..PROGRAMS {
        let status = std::process::Command::new("/proc/self/exe").arg(CHILD).status()?;
        sum += u64::from(status.code() == Some(RETURNED));
    }
    Ok(sum)
}

/// Pages that were never touched, each a page fault of the guest's own. The memory goes back, so that it faults again.
fn faults() -> Result<u64> {
    (0..TIMES).map(|_| touch(PAGES)).sum()
}

/// Fresh pages, written each, and read: the sum of what was written.
fn touch(pages: usize) -> Result<u64> {
    let length = pages * PAGE;
    // SAFETY: asks for memory of its own, at no given place.
    let start = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    ensure!(start != libc::MAP_FAILED, "no memory: {}", std::io::Error::last_os_error());
    // SAFETY: the range is this call's own; by small pages, so that each one faults. Refused where there are no large pages.
    unsafe { libc::madvise(start, length, libc::MADV_NOHUGEPAGE) };
    // SAFETY: the range is mapped, readable, writable, zeroed, and nobody else's until it is unmapped below.
    let memory = unsafe { std::slice::from_raw_parts_mut(start.cast::<u8>(), length) };
    let sum = write_and_read(memory);
    // SAFETY: the slice is used no more.
    unsafe { libc::munmap(start, length) };
    Ok(sum)
}

fn write_and_read(memory: &mut [u8]) -> u64 {
    memory.iter_mut().step_by(PAGE).zip((0..=255u8).cycle()).for_each(|(byte, n)| *byte = n);
    std::hint::black_box(&mut *memory).iter().step_by(PAGE).map(|byte| u64::from(*byte)).sum()
}

/// Memory that is there, over and over, more than the caches of translations hold.
fn sweep() -> Result<u64> {
    let mut memory = vec![1u8; PAGES * PAGE];
    Ok((0..SWEEPS).map(|_| write_and_read(&mut memory)).sum())
}

/// Calls of the kernel that do nothing.
fn calls() -> Result<u64> {
    // SAFETY: the call has no arguments.
    let parent = |_| unsafe { libc::syscall(libc::SYS_getppid) };
    Ok((0..SYSTEM_CALLS).map(parent).filter(|n| *n >= 0).count() as u64)
}

/// A byte to another process and back, over and over.
fn pipe() -> Result<u64> {
    let ((mut from_parent, mut to_child), (mut from_child, mut to_parent)) = (ends()?, ends()?);
    let mut byte = [0];
    // SAFETY: init has one thread here, so the child is a whole process; it ends without unwinding.
    let other = unsafe { libc::fork() };
    ensure!(other >= 0, "cannot fork: {}", std::io::Error::last_os_error());
    if other == 0 {
        drop((to_child, from_child));
        while from_parent.read_exact(&mut byte).is_ok() && to_parent.write_all(&[byte[0].wrapping_add(1)]).is_ok() {}
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    drop((from_parent, to_parent));
    let mut sum = 0;
    for n in 0..MESSAGES {
        to_child.write_all(&[n as u8])?;
        from_child.read_exact(&mut byte)?;
        sum += u64::from(byte[0]);
    }
    // The child's read fails, and it ends.
    drop(to_child);
    // SAFETY: a null pointer is where no status is wanted.
    ensure!(unsafe { libc::waitpid(other, std::ptr::null_mut(), 0) } == other, "a child was lost");
    Ok(sum)
}

/// The two ends of a pipe: to read, to write.
fn ends() -> Result<(File, File)> {
    let mut ends = [0; 2];
    // SAFETY: the pointer is to two descriptors that live until the call returns.
    ensure!(unsafe { libc::pipe(ends.as_mut_ptr()) } == 0, "no pipe: {}", std::io::Error::last_os_error());
    // SAFETY: both are new and nobody else's.
    Ok(unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) })
}

static FIRED: AtomicU64 = AtomicU64::new(0);

extern "C" fn fired(_: libc::c_int) {
    FIRED.fetch_add(1, Relaxed);
}

/// Computing, while a timer fires a thousand times a second.
fn timer() -> Result<u64> {
    let every = |micros| {
        let time = libc::timeval { tv_sec: 0, tv_usec: micros };
        let timer = libc::itimerval { it_interval: time, it_value: time };
        // SAFETY: the pointer is to a value that lives until the call returns.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) }
    };
    // SAFETY: the handler only counts.
    unsafe { libc::signal(libc::SIGALRM, fired as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    FIRED.store(0, Relaxed);
    ensure!(every(TIMER) == 0, "no timer: {}", std::io::Error::last_os_error());
    let mut value = 1u64;
    for n in 0..TURNS {
        value = std::hint::black_box(value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(n));
    }
    every(0);
    // How often it fired depends on how long the work took.
    ensure!(FIRED.load(Relaxed) > 0, "the timer never fired");
    Ok(value)
}

/// Barriers of memory that the kernel makes by an interrupt to the CPU on which the other thread runs.
///
/// Source: Linux manual pages, membarrier(2), MEMBARRIER_CMD_PRIVATE_EXPEDITED.
fn barriers() -> Result<u64> {
    const EXPEDITED: libc::c_int = 1 << 3;
    const REGISTER: libc::c_int = 1 << 4;
    // SAFETY: the call has no memory arguments.
    let barrier = |command: libc::c_int| unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    ensure!(barrier(REGISTER) == 0, "no membarrier: {}", std::io::Error::last_os_error());
    let (end, runs) = (AtomicBool::new(false), AtomicBool::new(false));
    Ok(std::thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Relaxed) {
                runs.store(true, Relaxed);
                std::hint::spin_loop();
            }
        });
        while !runs.load(Relaxed) {
            std::thread::yield_now();
        }
        let done = (0..BARRIERS).filter(|_| barrier(EXPEDITED) == 0).count() as u64;
        end.store(true, Relaxed);
        done
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_do_what_they_count() {
        let pages = PAGES as u64 / 256 * (255 * 256 / 2);
        assert_eq!((faults().unwrap(), sweep().unwrap()), (TIMES * pages, SWEEPS * pages));
        assert_eq!(calls().unwrap(), SYSTEM_CALLS);
        assert_eq!(barriers().unwrap(), BARRIERS);
        assert_eq!((child(), timer().unwrap()), (RETURNED, timer().unwrap()));
    }

    #[test]
    fn a_byte_comes_back_one_higher() {
        let whole = |n: u64| (0..n).map(|n| u64::from((n as u8).wrapping_add(1))).sum::<u64>();
        assert_eq!(pipe().unwrap(), whole(MESSAGES));
    }
}
