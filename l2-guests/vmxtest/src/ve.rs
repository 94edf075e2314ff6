//! EPT violations that become #VE: which entries leave them convertible, when they are converted, what is stored (SDM
//! "Virtualization Exceptions").

use crate::{
    guest::{self, Exit, Guest, Program},
    vmxon::too_wide,
};
use core::{arch::asm, ptr};
use l2_kit::{
    Check, Global, caps,
    ept::{self, Ept, rights},
    fields as f,
    pages::{self, LARGE, PAGE},
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, secondary},
    trap,
    vmx::{self, Outcome, reason as r},
};

/// The guest's linear address of the page under test.
const ALIAS: u64 = 5 << 30;
/// Linear address valid; the access was to it and not to page tables.
const LINEAR: u64 = 1 << 7;
const FINAL: u64 = 1 << 8;
/// What the information area's first word holds after a #VE: the basic exit reason, and that the area is in use.
const TAKEN: u64 = 0xFFFF_FFFF << 32 | r::EPT_VIOLATION as u64;
/// What a program returns after a trap, less the vector.
const TRAPPED: u64 = 0x100;
const VE: Exit = Exit::Done(TRAPPED + trap::VE as u64);
/// `mov eax, 0x77; ret`
const CODE: u64 = u64::from_le_bytes([0xB8, 0x77, 0, 0, 0, 0xC3, 0x90, 0x90]);

fn caught(access: impl FnOnce() -> u64) -> u64 {
    match trap::catch(access) {
        Ok(value) => value,
        // A #VE has no error code.
        Err(trap) => TRAPPED + u64::from(trap.vector) + trap.error,
    }
}

extern "C" fn read(address: u64) -> u64 {
    // SAFETY: the guest's page under test.
    caught(|| unsafe { ptr::read_volatile((address + 16) as *const u64) })
}

extern "C" fn write(address: u64) -> u64 {
    caught(|| {
        // SAFETY: the guest's page under test, after its code.
        unsafe { ptr::write_volatile((address + 16) as *mut u64, 0) };
        0
    })
}

extern "C" fn call(address: u64) -> u64 {
    caught(|| {
        // SAFETY: `all` puts code there.
        let code: extern "C" fn() -> u64 = unsafe { core::mem::transmute(address) };
        code();
        0
    })
}

const ACCESSES: [(&str, Program, u64, u64); 3] =
    [("read", read, rights::R, 16), ("write", write, rights::W, 16), ("fetch", call, rights::X, 0)];

struct Test {
    guest: Guest,
    ept: Ept,
    /// The page under test
    page: u64,
    /// The information area
    area: u64,
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    let Some(ept) = guest.ept else { return Ok(()) };
    if !setup::allowed_one(Kind::Secondary, secondary::EPT_VIOLATION_VE) {
        Check::new(&mut Serial, "#VE").fact("offered", false).end();
        return Ok(());
    }
    let page = pages::take(LARGE, LARGE);
    // SAFETY: fresh memory.
    let words = unsafe { pages::at(page) };
    words[0] = CODE;
    pages::set_entry(guest.cr3, ALIAS, page | 3);
    let mut test = Test { guest, ept, page, area: pages::address(pages::page()) };
    test.address();
    vmx::write(f::VE_INFORMATION, test.area);
    test.grid();
    test.missing_tables();
    test.busy();
    test.exception_bitmap();
    test.delivery();
    test.page_tables();
    test.handled();
    test.functions();
    Ok(())
}

fn control(on: bool) {
    let others = vmx::read(f::SECONDARY_CONTROLS) & !u64::from(secondary::EPT_VIOLATION_VE);
    vmx::write(f::SECONDARY_CONTROLS, others | if on { secondary::EPT_VIOLATION_VE.into() } else { 0 });
}

fn invalidate() {
    let _ = vmx::invept(2, [0, 0]);
}

/// A qualification without the bits that are undefined without advanced information.
fn defined(qualification: u64) -> u64 {
    if caps::get(setup::VMX_EPT_VPID_CAP) & 1 << 22 != 0 { qualification } else { qualification & !(7 << 9) }
}

impl Test {
    /// The words of the information area; the last one, 16 bits, is the EPTP index. Bochs stores there what VMFUNC set last,
    /// whatever stands in the VMCS, so that only VMFUNC's is looked at.
    fn information(&self) -> [u64; 5] {
        // SAFETY: our page; no guest runs. Whoever stores there does it behind the compiler's back.
        let mut words = [0, 1, 2, 3, 4].map(|n| unsafe { ptr::read_volatile((self.area as *const u64).add(n)) });
        words[4] &= 0xFFFF;
        words
    }

    /// An area that is free and holds nothing.
    fn clear(&self) {
        // SAFETY: as above.
        let words = unsafe { pages::at(self.area) };
        words[..5].fill(0);
    }

    /// Runs a program after all was forgotten.
    fn run(&mut self, program: Program) -> Exit {
        self.clear();
        invalidate();
        match self.guest.execute(program, ALIAS) {
            Exit::Reason(r::EPT_VIOLATION, q) => Exit::Reason(r::EPT_VIOLATION, defined(q)),
            other => other,
        }
    }

    /// What the entry asks of the area's address.
    fn address(&mut self) {
        for (name, address) in
            [("misaligned", 8), ("misaligned by half a page", 0x800), ("beyond the address width", too_wide())]
        {
            vmx::write(f::VE_INFORMATION, self.area | address);
            control(true);
            let refused = self.guest.execute(guest::nothing, 5);
            control(false);
            let not_used = self.guest.execute(guest::nothing, 5);
            Check::new(&mut Serial, format_args!("#VE information {name}"))
                .expect("used", refused, Exit::Refused(Outcome::FailValid(7)))
                .expect("not_used", not_used, Exit::Done(5))
                .end();
        }
    }

    /// Each refused access, with and without the bit that suppresses #VE, with and without the control.
    fn grid(&mut self) {
        for (size, size_name) in [(PAGE, "4K"), (LARGE, "2M")] {
            if size == LARGE {
                self.ept.set_entry(self.page, 1, 0);
            }
            for right in [0, 1, 3, 5, 4, 7] {
                if right == 4 && caps::get(setup::VMX_EPT_VPID_CAP) & 1 == 0 {
                    continue;
                }
                for suppress in [0, rights::SUPPRESS_VE] {
                    self.ept.map(self.page, size, right | suppress);
                    for (name, program, needed, offset) in ACCESSES {
                        for on in [true, false] {
                            control(on);
                            let exit = self.run(program);
                            let switch = if on { "on" } else { "off" };
                            let kind = if suppress != 0 { " suppressed" } else { "" };
                            self.one(
                                format_args!("#VE {switch} {size_name} {right:#x}{kind}: {name}"),
                                exit,
                                right,
                                needed,
                                offset,
                                on && suppress == 0,
                            );
                        }
                    }
                }
            }
        }
        control(true);
        self.ept.map(self.page, LARGE, rights::RWX);
    }

    fn one(&self, how: core::fmt::Arguments<'_>, exit: Exit, right: u64, needed: u64, offset: u64, converted: bool) {
        let qualification = defined(needed | right << 3 | LINEAR | FINAL | 1 << 10);
        let allowed = right & needed != 0;
        let wanted = match (allowed, converted) {
            (true, _) => Exit::Done(0),
            (false, true) => VE,
            (false, false) => Exit::Reason(r::EPT_VIOLATION, qualification),
        };
        let stored =
            if allowed || !converted { [0; 4] } else { [TAKEN, qualification, ALIAS + offset, self.page + offset] };
        let [taken, stored_qualification, linear, physical, _] = self.information();
        let information = [taken, defined(stored_qualification), linear, physical];
        Check::new(&mut Serial, how)
            .expect("result", exit, wanted)
            .expect("stored", information == stored, true)
            .fact("qualification", Hex(information[1]))
            .end();
    }

    /// The entry that is not present decides, at each level; what stands above it does not.
    fn missing_tables(&mut self) {
        for level in [1, 2, 3] {
            // Far from all that the guest needs: 16 GiB, or in another entry of the root.
            let far = if level == 3 { 1 << 39 } else { 16 << 30 };
            let linear = ALIAS + u64::from(level) * LARGE;
            self.ept.set(far, PAGE, self.page | ept::WRITE_BACK | rights::RWX);
            pages::set_entry(self.guest.cr3, linear, far | 3);
            let whole = self.ept.entry(far, level);
            for (name, entry, converted) in [
                ("present", whole, None),
                ("present and suppressed", whole | rights::SUPPRESS_VE, None),
                ("missing", 0, Some(true)),
                ("missing, other bits set", whole & !0x407, Some(true)),
                ("missing and suppressed", rights::SUPPRESS_VE, Some(false)),
            ] {
                self.ept.set_entry(far, level, entry);
                self.clear();
                invalidate();
                let exit = self.guest.execute(write, linear);
                let qualification = defined(rights::W | LINEAR | FINAL | 1 << 10);
                let wanted = match converted {
                    None => Exit::Done(0),
                    Some(true) => VE,
                    Some(false) => Exit::Reason(r::EPT_VIOLATION, qualification),
                };
                let exit = match exit {
                    Exit::Reason(reason, q) => Exit::Reason(reason, defined(q)),
                    other => other,
                };
                let stored = if converted == Some(true) { [TAKEN, far + 16] } else { [0, 0] };
                let information = self.information();
                Check::new(&mut Serial, format_args!("#VE: an entry of level {level} is {name}"))
                    .expect("result", exit, wanted)
                    .expect("taken", Hex(information[0]), Hex(stored[0]))
                    .expect("physical", Hex(information[3]), Hex(stored[1]))
                    .end();
            }
            self.ept.set_entry(far, level, whole);
        }
        // An upper entry takes the right away, the entry of the page decides on conversion.
        for (upper, leaf, converted) in [(0, 0, true), (rights::SUPPRESS_VE, 0, true), (0, rights::SUPPRESS_VE, false)]
        {
            self.ept.map(self.page, PAGE, rights::RWX | leaf);
            let whole = self.ept.entry(self.page, 1);
            self.ept.set_entry(self.page, 1, whole & !rights::W | upper);
            let exit = self.run(write);
            let qualification = defined(rights::W | 5 << 3 | LINEAR | FINAL | 1 << 10);
            let wanted = if converted { VE } else { Exit::Reason(r::EPT_VIOLATION, qualification) };
            Check::new(&mut Serial, format_args!("#VE: upper entry {:#x}, page {:#x}", upper >> 63, leaf >> 63))
                .expect("result", exit, wanted)
                .end();
            self.ept.set_entry(self.page, 1, whole);
        }
        self.ept.map(self.page, PAGE, rights::RWX);
    }

    /// While the area is in use violations are exits.
    fn busy(&mut self) {
        self.ept.map(self.page, PAGE, rights::R);
        for word in [1, 0x8000_0000, 0xFFFF_FFFF, 0x100] {
            self.clear();
            // SAFETY: our page; no guest runs.
            let words = unsafe { pages::at(self.area) };
            words[0] = word << 32;
            invalidate();
            let exit = self.guest.execute(write, ALIAS);
            let violation = matches!(exit, Exit::Reason(r::EPT_VIOLATION, _));
            Check::new(&mut Serial, format_args!("#VE information in use: {word:#x}"))
                .expect("exits", violation, true)
                .expect("stored", self.information() == [word << 32, 0, 0, 0, 0], true)
                .end();
        }
        // The word before it does not count.
        self.clear();
        // SAFETY: as above.
        let words = unsafe { pages::at(self.area) };
        words[0] = 0xFFFF_FFFF;
        invalidate();
        let exit = self.guest.execute(write, ALIAS);
        Check::new(&mut Serial, "#VE information with another reason")
            .expect("result", exit, VE)
            .expect("taken", Hex(self.information()[0]), Hex(TAKEN))
            .end();
    }

    /// A #VE is an exception like others: it exits if the exception bitmap says so.
    fn exception_bitmap(&mut self) {
        for (name, bitmap, wanted) in [
            ("the vector's bit", 1 << trap::VE, Exit::Reason(r::EXCEPTION_OR_NMI, 0)),
            ("all other bits", !(1u64 << trap::VE) & 0xFFFF_FFFF & !(1 << trap::UD), VE),
        ] {
            vmx::write(f::EXCEPTION_BITMAP, bitmap);
            let exit = self.run(write);
            let mut out = Serial;
            let check = Check::new(&mut out, format_args!("#VE and the exception bitmap with {name}"))
                .expect("result", exit, wanted)
                .expect("taken", Hex(self.information()[0]), Hex(TAKEN));
            match exit {
                Exit::Reason(..) => check
                    .expect("info", Hex(vmx::read(f::EXIT_INTERRUPTION_INFO)), Hex(1 << 31 | 3 << 8 | trap::VE as u64))
                    .expect("idt_vectoring", vmx::read(f::IDT_VECTORING_INFO) >> 31, 0)
                    .expect("rf", vmx::read(f::GUEST_RFLAGS) >> 16 & 1, 1)
                    .end(),
                _ => check.end(),
            }
        }
        vmx::write(f::EXCEPTION_BITMAP, 0);
    }

    /// Not while an event is delivered: here the stack is what is missing.
    fn delivery(&mut self) {
        extern "C" fn undefined_on(stack: u64) -> u64 {
            // SAFETY: the exit that follows ends this program.
            unsafe { asm!("mov rsp, {}", "ud2", in(reg) stack, options(noreturn)) }
        }
        self.ept.map(self.page, PAGE, rights::R);
        self.clear();
        invalidate();
        let exit = self.guest.execute(undefined_on, ALIAS + 0x800);
        Check::new(&mut Serial, "#VE: not while an exception is delivered")
            .expect("exits", matches!(exit, Exit::Reason(r::EPT_VIOLATION, _)), true)
            .expect("idt_vectoring", Hex(vmx::read(f::IDT_VECTORING_INFO)), Hex(1 << 31 | 3 << 8 | trap::UD as u64))
            .expect("taken", self.information()[0], 0)
            .end();
        // Mapped now, the exception goes on where it was.
        self.ept.map(self.page, PAGE, rights::RWX);
    }

    /// The guest's own page tables: the access is not to the linear address itself.
    fn page_tables(&mut self) {
        let linear = ALIAS + 40 * LARGE;
        pages::set_entry(self.guest.cr3, linear, self.page | 3 | 1 << 5 | 1 << 6);
        let table = pages::table_of(self.guest.cr3, linear);
        for (suppress, name) in [(0, "convertible"), (rights::SUPPRESS_VE, "suppressed")] {
            self.ept.map(table, PAGE, suppress);
            self.clear();
            invalidate();
            let exit = self.guest.execute(read, linear);
            let violation = matches!(exit, Exit::Reason(r::EPT_VIOLATION, q) if q & (LINEAR | FINAL) == LINEAR);
            let information = self.information();
            Check::new(&mut Serial, format_args!("#VE: the guest's page table is missing, {name}"))
                .expect("converted", exit == VE, suppress == 0)
                .expect("exits", violation, suppress != 0)
                .fact("qualification", Hex(information[1] & 0x1FF))
                .fact("linear", Hex(information[2]))
                .fact("physical", Hex(information[3].wrapping_sub(table)))
                .end();
            self.ept.map(table, PAGE, rights::RWX);
        }
        invalidate();
    }

    /// A handler that frees the area and asks for the page by VMCALL: the access comes to its end.
    fn handled(&mut self) {
        static HANDLED: Global<u64> = Global::new(0);
        extern "C" fn write_with_handler(address: u64) -> u64 {
            let before = trap::hook(
                trap::VE,
                Some(|_| {
                    HANDLED.set(HANDLED.get() + 1);
                    // SAFETY: the hypervisor reads RAX and changes nothing else.
                    unsafe { asm!("vmcall", in("rax") 0x5E, options(nostack)) };
                    true
                }),
            );
            let value = write(address) + HANDLED.get();
            trap::hook(trap::VE, before);
            value
        }
        for tries in [1u64, 3] {
            HANDLED.set(0);
            self.ept.map(self.page, PAGE, rights::R);
            let mut exit = self.run(write_with_handler);
            let mut calls = 0;
            while calls < tries && exit == Exit::Reason(r::VMCALL, 0) {
                calls += 1;
                self.clear();
                if calls == tries {
                    self.ept.map(self.page, PAGE, rights::RWX);
                    invalidate();
                }
                vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP) + vmx::read(f::EXIT_INSTRUCTION_LENGTH));
                exit = self.guest.run();
            }
            Check::new(&mut Serial, format_args!("#VE: a handler gets the page after {tries}"))
                .expect("calls", calls, tries)
                .expect("result", exit, Exit::Done(tries))
                .end();
        }
    }

    /// A handler that changes to another tree, which needs no exit; the index of that tree is stored the next time.
    fn functions(&mut self) {
        static INFORMATION: Global<u64> = Global::new(0);
        extern "C" fn write_and_switch(address: u64) -> u64 {
            let before = trap::hook(
                trap::VE,
                Some(|_| {
                    // SAFETY: the information area, mapped one to one; both trees map this image.
                    unsafe {
                        ((INFORMATION.get() + 4) as *mut u32).write_volatile(0);
                        asm!("vmfunc", in("rax") 0, in("rcx") 3);
                    }
                    true
                }),
            );
            let first = write(address);
            trap::hook(trap::VE, before);
            // In the other tree this page is the one that is missing.
            first << 16 | write(address + PAGE)
        }
        let functions =
            setup::allowed_one(Kind::Secondary, secondary::VM_FUNCTIONS) && caps::get(setup::VMX_VMFUNC) & 1 != 0;
        if !functions {
            Check::new(&mut Serial, "#VE and VM functions").fact("offered", false).end();
            return;
        }
        let other = Ept::identity();
        let next = self.page + PAGE;
        pages::set_entry(self.guest.cr3, ALIAS + PAGE, next | 3);
        self.ept.map(self.page, PAGE, rights::R);
        other.map(next, PAGE, rights::NONE);
        let list = pages::page();
        list[3] = other.pointer();
        let secondary = vmx::read(f::SECONDARY_CONTROLS);
        vmx::write(f::SECONDARY_CONTROLS, secondary | u64::from(secondary::VM_FUNCTIONS));
        vmx::write(f::VM_FUNCTION_CONTROLS, 1);
        vmx::write(f::EPTP_LIST, pages::address(list));
        INFORMATION.set(self.area);
        let exit = self.run(write_and_switch);
        let information = self.information();
        Check::new(&mut Serial, "#VE: a handler switches EPTP")
            .expect("result", exit, VE)
            .expect("taken", Hex(information[0]), Hex(TAKEN))
            .expect("physical", Hex(information[3]), Hex(next + 16))
            .expect("index", information[4], 3)
            .expect("field", vmx::read(f::EPTP_INDEX), 3)
            .expect("eptp", vmx::read(f::EPTP) == other.pointer(), true)
            .end();
        vmx::write(f::SECONDARY_CONTROLS, secondary);
        vmx::write(f::EPTP, self.ept.pointer());
        vmx::write(f::EPTP_INDEX, 0);
        self.ept.map(self.page, PAGE, rights::RWX);
    }
}
