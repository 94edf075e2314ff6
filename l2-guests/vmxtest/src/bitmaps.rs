//! MSR and I/O bitmaps: which accesses exit (SDM "MSR-Bitmap Address", "I/O-Bitmap Addresses").

use crate::guest::{Exit, Guest, Program};
use core::arch::asm;
use l2_kit::{
    Check,
    cpu::{self, LSTAR},
    fields as f, pages,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, primary, secondary},
    vmx,
    vmx::reason as r,
};

const SYSENTER_CS: u32 = 0x174;

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    msr_bitmap(&mut guest);
    io_bitmaps(&mut guest);
    Ok(())
}

extern "C" fn read_msr(msr: u64) -> u64 {
    cpu::rdmsr(msr as u32)
}

extern "C" fn write_msr(msr: u64) -> u64 {
    cpu::wrmsr(msr as u32, 0);
    5
}

/// Each MSR has a bit for reads and one for writes, which are looked at when the guest uses it; MSRs outside the bitmap exit.
fn msr_bitmap(guest: &mut Guest) {
    if !setup::allowed_one(Kind::Primary, primary::MSR_BITMAPS) {
        Check::new(&mut Serial, "MSR bitmap").fact("offered", false).end();
        return;
    }
    let bitmap = vmx::read(f::MSR_BITMAP);
    for (msr, read_bit, write_bit) in [
        (SYSENTER_CS, u64::from(SYSENTER_CS), 0x4000 + u64::from(SYSENTER_CS)),
        (LSTAR, 0x2000 + u64::from(LSTAR & 0x1FFF), 0x6000 + u64::from(LSTAR & 0x1FFF)),
    ] {
        for (name, program, bit, reason, passed) in
            [("read", read_msr as Program, read_bit, r::RDMSR, 0), ("write", write_msr, write_bit, r::WRMSR, 5)]
        {
            let set = |value: u64| {
                // SAFETY: our page; no guest runs.
                let words = unsafe { pages::at(bitmap) };
                words[(bit / 64) as usize] = value << (bit % 64);
            };
            let before = guest.execute(program, msr.into());
            set(1);
            let exits = guest.execute(program, msr.into());
            set(0);
            let after = guest.execute(program, msr.into());
            Check::new(&mut Serial, format_args!("MSR bitmap: {name} of {msr:#x}"))
                .expect("clear", before, Exit::Done(passed))
                .expect("set", exits, Exit::Reason(reason, 0))
                .expect("clear_again", after, Exit::Done(passed))
                .end();
        }
    }
    for msr in [0x2000, 0x4000_0000, 0xBFFF_FFFF, 0xC000_2000] {
        Check::new(&mut Serial, format_args!("MSR bitmap: {msr:#x} is outside"))
            .expect("read", guest.execute(read_msr, msr), Exit::Reason(r::RDMSR, 0))
            .expect("write", guest.execute(write_msr, msr), Exit::Reason(r::WRMSR, 0))
            .end();
    }
}

extern "C" fn in_byte(port: u64) -> u64 {
    cpu::in8(port as u16);
    5
}

extern "C" fn in_word(port: u64) -> u64 {
    // SAFETY: harmless ports.
    unsafe { asm!("in ax, dx", in("dx") port as u16, out("ax") _) };
    5
}

fn io_bitmaps(guest: &mut Guest) {
    let (a, b) = (pages::page(), pages::page());
    a[0x80 / 64] |= 1 << (0x80 % 64);
    b[0] |= 1;
    let old = vmx::read(f::PRIMARY_CONTROLS);
    vmx::write(f::PRIMARY_CONTROLS, old | u64::from(primary::IO_BITMAPS));
    vmx::write(f::IO_BITMAP_A, pages::address(a));
    vmx::write(f::IO_BITMAP_B, pages::address(b));
    let io = |port: u64, size: u64| Exit::Reason(r::IO, port << 16 | 8 | size);
    Check::new(&mut Serial, "I/O bitmaps")
        .expect("set", guest.execute(in_byte, 0x80), io(0x80, 0))
        .expect("clear", guest.execute(in_byte, 0x81), Exit::Done(5))
        .expect("second_byte_set", guest.execute(in_word, 0x7F), io(0x7F, 1))
        .expect("first_of_b", guest.execute(in_byte, 0x8000), io(0x8000, 0))
        .expect("word_into_b", guest.execute(in_word, 0x7FFF), io(0x7FFF, 1))
        .expect("wraps", guest.execute(in_word, 0xFFFF), io(0xFFFF, 1))
        .end();
    vmx::write(f::PRIMARY_CONTROLS, old | u64::from(primary::IO_BITMAPS | primary::UNCONDITIONAL_IO));
    let both = guest.execute(in_byte, 0x81);
    vmx::write(f::PRIMARY_CONTROLS, old);
    Check::new(&mut Serial, "I/O bitmaps win over unconditional I/O").expect("clear", both, Exit::Done(5)).end();
}
