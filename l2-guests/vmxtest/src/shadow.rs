//! VMCS shadowing: what VMREAD and VMWRITE of a guest reach, and what its hypervisor sees of it (SDM "VMCS Shadowing").

use crate::{
    guest::{Exit, Guest},
    vmxon::too_wide,
};
use core::{arch::asm, ptr};
use l2_kit::{
    Check, caps,
    cpu::CR4_VMXE,
    fields as f,
    pages::{self, PAGE},
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, secondary},
    trap,
    vmx::{self, Outcome, reason as r},
};

const SHADOW: u64 = 1 << 31;
const CF: u64 = 1;
const ZF: u64 = 1 << 6;
const ARITHMETIC: u64 = 0x8D5;
const NO_LINK: u64 = u64::MAX;
/// More shadow VMCSs than a processor, or whoever stands in for one, is likely to keep at hand.
const MANY: usize = 11;

/// One access of the guest, in memory that it shares with us.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Access {
    field: u64,
    value: u64,
    flags: u64,
}

/// VMREAD; RAX is the trap's vector, 0 if there was none.
extern "C" fn read(at: u64) -> u64 {
    caught(at, |a| {
        let (value, flags): (u64, u64);
        // SAFETY: the instruction changes its destination and flags.
        unsafe {
            asm!("vmread {}, {}", "pushfq", "pop {}", inout(reg) a.value => value, in(reg) a.field, out(reg) flags)
        };
        (a.value, a.flags) = (value, flags & ARITHMETIC);
    })
}

/// VMWRITE.
extern "C" fn write(at: u64) -> u64 {
    caught(at, |a| {
        let flags: u64;
        // SAFETY: the instruction changes flags.
        unsafe { asm!("vmwrite {}, {}", "pushfq", "pop {}", in(reg) a.field, in(reg) a.value, out(reg) flags) };
        a.flags = flags & ARITHMETIC;
    })
}

/// VMREAD into memory, VMWRITE from there: `value` is the address.
extern "C" fn read_memory(at: u64) -> u64 {
    caught(at, |a| {
        let flags: u64;
        // SAFETY: as in `read`; the memory is set aside for this.
        unsafe { asm!("vmread [{}], {}", "pushfq", "pop {}", in(reg) a.value, in(reg) a.field, out(reg) flags) };
        a.flags = flags & ARITHMETIC;
    })
}

extern "C" fn write_memory(at: u64) -> u64 {
    caught(at, |a| {
        let flags: u64;
        // SAFETY: as in `write`.
        unsafe { asm!("vmwrite {}, [{}]", "pushfq", "pop {}", in(reg) a.field, in(reg) a.value, out(reg) flags) };
        a.flags = flags & ARITHMETIC;
    })
}

fn caught(at: u64, f: impl FnOnce(&mut Access)) -> u64 {
    // SAFETY: `Shadowing::run` puts it there; volatile, as the hypervisor looks at it in between.
    let mut access = unsafe { ptr::read_volatile(at as *const Access) };
    let vector = trap::catch(|| f(&mut access)).err().map_or(0, |trap| trap.vector.into());
    // SAFETY: as above.
    unsafe { ptr::write_volatile(at as *mut Access, access) };
    vector
}

struct Shadowing {
    guest: Guest,
    shadow: u64,
    bitmaps: [u64; 2],
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    if !setup::allowed_one(Kind::Secondary, secondary::VMCS_SHADOWING) {
        Check::new(&mut Serial, "VMCS shadowing").fact("offered", false).end();
        return Ok(());
    }
    let guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    let bitmaps = [pages::page(), pages::page()].map(|page| pages::address(page));
    let mut t = Shadowing { guest, shadow: region(), bitmaps };
    t.without();
    vmx::write(f::SECONDARY_CONTROLS, vmx::read(f::SECONDARY_CONTROLS) | u64::from(secondary::VMCS_SHADOWING));
    t.bitmap_addresses();
    vmx::write(f::VMREAD_BITMAP, bitmaps[0]);
    vmx::write(f::VMWRITE_BITMAP, bitmaps[1]);
    t.unlinked();
    t.link_pointers();
    vmx::write(f::LINK_POINTER, t.shadow);
    t.every_field();
    t.bitmap_bits();
    t.encodings();
    t.operands();
    t.many();
    t.rewritten();
    vmx::write(f::LINK_POINTER, NO_LINK);
    Ok(())
}

/// A cleared shadow VMCS.
fn region() -> u64 {
    let page = pages::page();
    page[0] = u64::from(setup::revision()) | SHADOW;
    let at = pages::address(page);
    let outcome = vmx::vmclear(at);
    Check::new(&mut Serial, "vmclear: a shadow VMCS").expect("result", outcome, Outcome::Succeed).end();
    at
}

/// The first word of a region.
fn word(at: u64) -> &'static mut u64 {
    // SAFETY: our page.
    unsafe { &mut *(at as *mut u64) }
}

/// What a field holds when it was written with `value`.
fn kept(encoding: u32, value: u64) -> u64 {
    let rights = (f::GUEST_ES_AR..=f::GUEST_TR_AR).contains(&encoding);
    match encoding >> 13 & 3 {
        0 => value & 0xFFFF,
        2 if rights => value & 0x1_F0FF,
        2 => value & 0xFFFF_FFFF,
        _ => value,
    }
}

fn exits(reason: u32) -> Exit {
    Exit::Reason(reason, 0)
}

impl Shadowing {
    /// Runs one access of the guest.
    fn run(&mut self, program: crate::guest::Program, field: u64, value: u64) -> (Exit, Access) {
        let access = Access { field, value, flags: 0xFFFF };
        let exit = self.guest.execute(program, &raw const access as u64);
        // SAFETY: the guest has written to it.
        (exit, unsafe { ptr::read_volatile(&raw const access) })
    }

    fn entered(&mut self) -> Exit {
        self.guest.execute(crate::guest::nothing, 5)
    }

    /// Something done with the shadow VMCS as the current one.
    fn within<T>(&self, shadow: u64, f: impl FnOnce() -> T) -> T {
        let loaded = vmx::vmptrld(shadow).succeeded();
        let result = f();
        let back = vmx::vmptrld(self.guest.vcpu.vmcs).succeeded();
        if !(loaded && back) {
            l2_kit::report::fail(format_args!("VMPTRLD of {shadow:#x} or back"));
        }
        result
    }

    fn put(&self, bitmap: usize, bit: u64, value: bool) {
        // SAFETY: our page; no guest runs.
        let words = unsafe { pages::at(self.bitmaps[bitmap]) };
        let (word, mask) = (&mut words[(bit / 64) as usize], 1 << (bit % 64));
        if value { *word |= mask } else { *word &= !mask }
    }

    fn without(&mut self) {
        for (name, program, reason) in
            [("vmread", read as crate::guest::Program, r::VMREAD), ("vmwrite", write, r::VMWRITE)]
        {
            let (exit, _) = self.run(program, f::GUEST_RIP.into(), 1);
            Check::new(&mut Serial, format_args!("{name} of a guest without VMCS shadowing"))
                .expect("result", exit, exits(reason))
                .end();
        }
        // An ordinary VMCS may be linked, a shadow VMCS may not.
        vmx::write(f::LINK_POINTER, self.shadow);
        let exit = self.entered();
        vmx::write(f::LINK_POINTER, NO_LINK);
        Check::new(&mut Serial, "link to a shadow VMCS without VMCS shadowing")
            .expect("result", exit, Exit::Failed(r::INVALID_GUEST_STATE, 4))
            .end();
    }

    fn bitmap_addresses(&mut self) {
        for field in [f::VMREAD_BITMAP, f::VMWRITE_BITMAP] {
            for bad in [1, 0x800, 0xFFF, 1 << 63, too_wide()] {
                vmx::write(f::VMREAD_BITMAP, self.bitmaps[0]);
                vmx::write(f::VMWRITE_BITMAP, self.bitmaps[1]);
                vmx::write(field, bad);
                let exit = self.entered();
                Check::new(&mut Serial, format_args!("bitmap {field:#x} at {bad:#x}"))
                    .expect("result", exit, Exit::Refused(Outcome::FailValid(7)))
                    .end();
            }
        }
    }

    fn unlinked(&mut self) {
        for (name, program) in [("vmread", read as crate::guest::Program), ("vmwrite", write)] {
            for field in [f::GUEST_RIP, f::HOST_RIP, f::EXIT_REASON, f::GUEST_ACTIVITY] {
                let (exit, access) = self.run(program, field.into(), 1);
                Check::new(&mut Serial, format_args!("{name} of {field:#x} without a link"))
                    .expect("result", exit, Exit::Done(0))
                    .expect("flags", Hex(access.flags), Hex(CF))
                    .end();
            }
        }
    }

    fn link_pointers(&mut self) {
        let failed = Exit::Failed(r::INVALID_GUEST_STATE, 4);
        let good = Exit::Done(5);
        let other = region();
        let revision = u64::from(setup::revision());
        let own = self.guest.vcpu.vmcs;
        let cases = [
            ("good", other, revision | SHADOW, good),
            ("no indicator", other, revision, failed),
            ("other revision", other, (revision ^ 1) | SHADOW, failed),
            ("nothing", other, 0, failed),
            ("good again", other, revision | SHADOW, good),
            ("misaligned", other + 8, revision | SHADOW, failed),
            ("too wide", other | too_wide(), revision | SHADOW, failed),
            ("itself", own, revision | SHADOW, failed),
        ];
        for (name, at, first, wanted) in cases {
            vmx::vmclear(other);
            *word(other) = first;
            vmx::write(f::LINK_POINTER, at);
            let exit = self.entered();
            Check::new(&mut Serial, format_args!("link pointer: {name}")).expect("result", exit, wanted).end();
        }
        vmx::write(f::LINK_POINTER, NO_LINK);
        for (name, first, wanted) in [
            ("a shadow VMCS", revision | SHADOW, Outcome::Succeed),
            ("a shadow VMCS of another revision", (revision ^ 1) | SHADOW, Outcome::FailValid(11)),
        ] {
            vmx::vmclear(other);
            *word(other) = first;
            let outcome = vmx::vmptrld(other);
            let (_, current) = vmx::vmptrst();
            vmx::vmptrld(own);
            Check::new(&mut Serial, format_args!("vmptrld: {name}"))
                .expect("result", outcome, wanted)
                .expect("current", current == other, wanted == Outcome::Succeed)
                .end();
        }
        vmx::vmclear(other);
    }

    /// What we write the guest reads, what it writes we read; both change no other field's neighbour.
    fn every_field(&mut self) {
        let any_field = caps::own_or_0(setup::VMX_MISC) & 1 << 29 != 0;
        for (name, encoding) in f::ALL {
            let exists = self.within(self.shadow, || vmx::try_read((*encoding).into()).0.succeeded());
            if !exists || !common(*encoding) {
                continue;
            }
            let (ours, theirs) = (kept(*encoding, 0x1234_5678_9ABC_D0D5), kept(*encoding, 0x0FED_CBA9_8765_40A3));
            let read_only = encoding >> 10 & 3 == 1;
            let writable = any_field || !read_only;
            let before = self.within(self.shadow, || {
                if writable {
                    vmx::try_write((*encoding).into(), ours);
                }
                vmx::read(*encoding)
            });
            let (read_exit, seen) = self.run(read, (*encoding).into(), 0);
            let (write_exit, written) = self.run(write, (*encoding).into(), theirs);
            let after = self.within(self.shadow, || vmx::read(*encoding));
            let mut out = Serial;
            let mut check = Check::new(&mut out, format_args!("shadow field {name}"))
                .expect("read", read_exit, Exit::Done(0))
                .expect("read_flags", Hex(seen.flags), Hex(0))
                .expect("seen", Hex(seen.value), Hex(before))
                .expect("write", write_exit, Exit::Done(0))
                .expect("write_flags", Hex(written.flags), Hex(if writable { 0 } else { ZF }));
            if writable {
                check = check.expect("ours", Hex(before), Hex(ours)).expect("theirs", Hex(after), Hex(theirs));
            }
            check.end();
        }
        // The upper half of a 64-bit field is a field of its own.
        self.within(self.shadow, || vmx::write(f::TSC_OFFSET, 0x1111_2222_3333_4444));
        let (_, high) = self.run(read, u64::from(f::TSC_OFFSET) | 1, 0);
        self.run(write, u64::from(f::TSC_OFFSET) | 1, 0x5555);
        self.run(write, u64::from(f::MSR_BITMAP) | 1, 0x6666);
        let (_, cached) = self.run(read, u64::from(f::MSR_BITMAP) | 1, 0);
        let both = self.within(self.shadow, || vmx::read(f::TSC_OFFSET));
        Check::new(&mut Serial, "shadow: the upper half of a field")
            .expect("seen", Hex(high.value), Hex(0x1111_2222))
            .expect("written", Hex(both), Hex(0x5555_3333_4444))
            .expect("in_the_copy", Hex(cached.value), Hex(0x6666))
            .end();
    }

    /// A bit is looked at when the guest executes the instruction, and for one instruction only.
    fn bitmap_bits(&mut self) {
        let fields = [
            f::GUEST_CS,
            f::HOST_CS,
            f::TSC_OFFSET,
            f::EPTP,
            f::GUEST_PHYSICAL_ADDRESS,
            f::GUEST_PAT,
            f::PIN_CONTROLS,
            f::INSTRUCTION_ERROR,
            f::EXIT_REASON,
            f::GUEST_ACTIVITY,
            f::CR3_TARGET_COUNT,
            f::HOST_SYSENTER_CS,
            f::CR0_MASK,
            f::EXIT_QUALIFICATION,
            f::GUEST_RIP,
            f::HOST_RSP,
        ];
        for field in fields {
            let field = u64::from(field);
            let mut results = [Exit::Done(99); 6];
            for bitmap in [0, 1] {
                let (program, other): (crate::guest::Program, crate::guest::Program) =
                    if bitmap == 0 { (read, write) } else { (write, read) };
                self.put(bitmap, field, true);
                results[bitmap * 3] = self.run(program, field, 2).0;
                results[bitmap * 3 + 1] = self.run(other, field, 2).0;
                self.put(bitmap, field, false);
                results[bitmap * 3 + 2] = self.run(program, field, 2).0;
            }
            Check::new(&mut Serial, format_args!("shadow bitmaps: {field:#x}"))
                .expect("read_set", results[0], exits(r::VMREAD))
                .expect("write_then", results[1], Exit::Done(0))
                .expect("read_clear", results[2], Exit::Done(0))
                .expect("write_set", results[3], exits(r::VMWRITE))
                .expect("read_then", results[4], Exit::Done(0))
                .expect("write_clear", results[5], Exit::Done(0))
                .end();
        }
    }

    /// Encodings that are no fields, and those that no bitmap covers.
    fn encodings(&mut self) {
        for encoding in [0x7FFE_u64, 0x0003, 0x681F, 0x4401, 0x6C20, 0x7000] {
            for (name, program) in [("vmread", read as crate::guest::Program), ("vmwrite", write)] {
                let (exit, access) = self.run(program, encoding, 3);
                Check::new(&mut Serial, format_args!("shadow: {name} of {encoding:#x}"))
                    .expect("result", exit, Exit::Done(0))
                    .expect("flags", Hex(access.flags), Hex(ZF))
                    .expect("error", vmx::read(f::INSTRUCTION_ERROR), 12)
                    .end();
            }
        }
        for encoding in [0x8000, 0x681E | 1 << 15, 0x681E | 1 << 31, 0x681E | 1 << 32, 1 << 63, u64::MAX] {
            for (name, program, reason) in
                [("vmread", read as crate::guest::Program, r::VMREAD), ("vmwrite", write, r::VMWRITE)]
            {
                let (exit, _) = self.run(program, encoding, 3);
                Check::new(&mut Serial, format_args!("shadow: {name} of {encoding:#x}"))
                    .expect("result", exit, exits(reason))
                    .expect("length", vmx::read(f::EXIT_INSTRUCTION_LENGTH), 3)
                    .fact("information", Hex(vmx::read(f::EXIT_INSTRUCTION_INFO) & 0xF000_0400))
                    .end();
            }
        }
    }

    /// Operands in memory: there, not in the guest's page tables, not in its memory.
    fn operands(&mut self) {
        let target = pages::take(3 * PAGE, PAGE);
        let cr3 = vmx::read(f::GUEST_CR3);
        let set_present = |present: bool| pages::set_entry(cr3, target, if present { target | 3 } else { 0 });
        for field in [f::GUEST_RIP, f::HOST_RIP] {
            let encoding = u64::from(field);
            self.within(self.shadow, || vmx::write(field, 0x1234_5678_9ABC));
            *word(target) = 0;
            let (read_exit, _) = self.run(read_memory, encoding, target);
            let seen = *word(target);
            *word(target) = 0x4321_0000_4444;
            let (write_exit, _) = self.run(write_memory, encoding, target);
            let written = self.within(self.shadow, || vmx::read(field));
            // Across the end of a page.
            *word(target + PAGE) = 0;
            let (split_exit, _) = self.run(read_memory, encoding, target + PAGE - 4);
            // SAFETY: our memory.
            let split = unsafe { ptr::read_unaligned((target + PAGE - 4) as *const u64) };
            Check::new(&mut Serial, format_args!("shadow: {field:#x} to and from memory"))
                .expect("read", read_exit, Exit::Done(0))
                .expect("seen", Hex(seen), Hex(0x1234_5678_9ABC))
                .expect("write", write_exit, Exit::Done(0))
                .expect("written", Hex(written), Hex(0x4321_0000_4444))
                .expect("split", split_exit, Exit::Done(0))
                .expect("split_seen", Hex(split), Hex(0x4321_0000_4444))
                .end();
            set_present(false);
            let (read_exit, _) = self.run(read_memory, encoding, target + 8);
            let (write_exit, _) = self.run(write_memory, encoding, target + 8);
            set_present(true);
            Check::new(&mut Serial, format_args!("shadow: {field:#x} and a page that is not there"))
                .expect("read", read_exit, Exit::Done(trap::PF.into()))
                .expect("write", write_exit, Exit::Done(trap::PF.into()))
                .end();
            for (name, program) in [("read", read_memory as crate::guest::Program), ("write", write_memory)] {
                if let Some(ept) = &self.guest.ept {
                    ept.unmap(target, PAGE);
                }
                vmx::invept(2, [0, 0]);
                let (exit, _) = self.run(program, encoding, target + 16);
                let physical = vmx::read(f::GUEST_PHYSICAL_ADDRESS);
                let linear = vmx::read(f::GUEST_LINEAR_ADDRESS);
                if let Some(ept) = &self.guest.ept {
                    ept.map(target, PAGE, l2_kit::ept::rights::RWX);
                }
                let resumed = self.guest.run();
                let is_violation = matches!(exit, Exit::Reason(r::EPT_VIOLATION, _));
                let qualification = if let Exit::Reason(_, q) = exit { q & 0x1BF } else { 0 };
                Check::new(&mut Serial, format_args!("shadow: {name} of {field:#x} and a hole in the guest's memory"))
                    .expect("violation", is_violation, true)
                    .expect("qualification", Hex(qualification), Hex(if name == "read" { 0x182 } else { 0x181 }))
                    .expect("physical", Hex(physical), Hex(target + 16))
                    .expect("linear", Hex(linear), Hex(target + 16))
                    .expect("resumed", resumed, Exit::Done(0))
                    .end();
            }
        }
    }

    /// Each keeps what is its own.
    fn many(&mut self) {
        let regions: [u64; MANY] = core::array::from_fn(|_| region());
        for round in 0..2u64 {
            for (i, at) in (0u64..).zip(regions) {
                vmx::write(f::LINK_POINTER, at);
                for (field, mark) in [(f::GUEST_RIP, 0x1000), (f::HOST_RIP, 0x2000), (f::EXIT_REASON, 0x3000)] {
                    let (exit, seen) = self.run(read, field.into(), 77);
                    let wanted = if round == 0 { 0 } else { mark + i };
                    self.run(write, field.into(), mark + i);
                    let ours = self.within(at, || vmx::read(field));
                    Check::new(&mut Serial, format_args!("shadow {i} of many, round {round}: {field:#x}"))
                        .expect("read", exit, Exit::Done(0))
                        .expect("seen", Hex(seen.value), Hex(wanted))
                        .expect("ours", Hex(ours), Hex(mark + i))
                        .end();
                }
            }
        }
        vmx::write(f::LINK_POINTER, self.shadow);
        regions.into_iter().for_each(|at| _ = vmx::vmclear(at));
    }

    /// After VMCLEAR the region is all there is: one with another's content is that other, whoever still remembers the first.
    fn rewritten(&mut self) {
        let [a, b] = [region(), region()];
        for (at, value) in [(a, 0xAAAA), (b, 0xBBBB)] {
            self.within(at, || {
                vmx::write(f::GUEST_RSP, value);
                vmx::write(f::HOST_CR3, value << 12);
            });
            vmx::vmclear(at);
        }
        // SAFETY: two pages of ours, which no VMCS is active in.
        unsafe { ptr::copy_nonoverlapping(b as *const u8, a as *mut u8, PAGE as usize) };
        let loaded = self.within(a, || (vmx::read(f::GUEST_RSP), vmx::read(f::HOST_CR3)));
        vmx::vmclear(a);
        vmx::write(f::LINK_POINTER, a);
        let (_, linked) = self.run(read, f::HOST_CR3.into(), 0);
        Check::new(&mut Serial, "a VMCS region with another's content")
            .expect("guest_rsp", Hex(loaded.0), Hex(0xBBBB))
            .expect("host_cr3", Hex(loaded.1), Hex(0xBBBB << 12))
            .expect("linked", Hex(linked.value), Hex(0xBBBB << 12))
            .end();
        vmx::write(f::LINK_POINTER, self.shadow);
        // The same VMCS in both forms in turn, as a hypervisor does that lets its guest see it.
        self.within(a, || vmx::write(f::GUEST_CR4, CR4_VMXE));
        vmx::vmclear(a);
        *word(a) &= !SHADOW;
        let as_ordinary = self.within(a, || vmx::read(f::GUEST_CR4));
        vmx::vmclear(a);
        *word(a) |= SHADOW;
        vmx::write(f::LINK_POINTER, a);
        let (_, seen) = self.run(read, f::GUEST_CR4.into(), 0);
        Check::new(&mut Serial, "a VMCS as ordinary and as shadow")
            .expect("ordinary", Hex(as_ordinary), Hex(CR4_VMXE))
            .expect("shadow", Hex(seen.value), Hex(CR4_VMXE))
            .end();
    }
}

/// Fields that exist wherever VMCS shadowing does, or go by a capability that both machines of a comparison have.
fn common(encoding: u32) -> bool {
    let secondary = |bit: u32| setup::allowed_one(Kind::Secondary, 1 << bit);
    let primary = |bit: u32| setup::allowed_one(Kind::Primary, 1 << bit);
    match encoding {
        f::POSTED_INT_VECTOR | f::GUEST_INTERRUPT_STATUS => secondary(9),
        f::EPTP_INDEX => secondary(18),
        f::PML_INDEX | f::PML_ADDR => secondary(17),
        f::VIRTUAL_APIC | f::TPR_THRESHOLD => primary(21),
        f::APIC_ACCESS => secondary(0),
        f::XSS_EXITING => secondary(20),
        f::TSC_MULTIPLIER => secondary(25),
        f::GUEST_PERF_GLOBAL_CTRL => setup::allowed_one(Kind::Entry, 1 << 13),
        f::HOST_PERF_GLOBAL_CTRL => setup::allowed_one(Kind::Exit, 1 << 12),
        // Its value after a failure of ours is not the guest's business.
        f::INSTRUCTION_ERROR => false,
        _ => true,
    }
}
