//! VM functions: VMFUNC with and without its controls, EPTP switching (SDM "VM Functions", "EPTP Switching").

use crate::{
    expect::{Got, UD, expect},
    guest::{self, Exit, Guest},
    vmxon::too_wide,
};
use core::{arch::global_asm, ptr};
use l2_kit::{
    Check, caps,
    ept::{self, Ept, rights},
    fields as f,
    pages::{self, PAGE},
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, primary, secondary},
    trap, user,
    vmx::{self, Outcome, reason as r},
};

/// The guest's linear address of the page that each tree maps elsewhere.
const ALIAS: u64 = 5 << 30;
/// More trees than a processor, or whoever stands in for one, is likely to keep at hand.
const TREES: usize = 12;
/// What the page holds in tree n is n more.
const MARK: u64 = 0xA0;
const ENTRIES: u64 = 512;
const EPTP_SWITCHING: u64 = 1;

global_asm!(
    ".pushsection .text.vmxtest_vmfunc, \"ax\"",
    "vmxtest_vmfunc:",
    "mov rax, rdi",
    "mov rcx, rsi",
    "vmfunc",
    "int3",
    ".code32",
    "vmxtest_vmfunc32:",
    "mov eax, edi",
    "mov ecx, esi",
    "vmfunc",
    "int3",
    ".code64",
    ".popsection",
);

unsafe extern "C" {
    fn vmxtest_vmfunc();
    fn vmxtest_vmfunc32();
}

/// RAX and RCX of a VMFUNC, in memory that the guest shares.
#[repr(C)]
struct Call {
    rax: u64,
    rcx: u64,
}

/// VMFUNC of ring 0; 5 if it was executed and changed no register and no flag.
extern "C" fn call(at: u64) -> u64 {
    // SAFETY: `execute` puts it there.
    let Call { rax, rcx } = unsafe { ptr::read_volatile(at as *const Call) };
    let (mut rax_after, mut rcx_after) = (rax, rcx);
    match trap::catch(|| l2_kit::vmx!("vmfunc", inout("rax") rax_after, inout("rcx") rcx_after)) {
        Ok(outcome) => {
            let flags = matches!(outcome, Outcome::Strange(0x8D5));
            if flags && (rax_after, rcx_after) == (rax, rcx) { 5 } else { 6 }
        }
        Err(trap) => 0x100 + u64::from(trap.vector),
    }
}

fn execute(guest: &mut Guest, rax: u64, rcx: u64) -> Exit {
    let call_of = Call { rax, rcx };
    guest.execute(call, &raw const call_of as u64)
}

const DONE: Exit = Exit::Done(5);
const EXITS: Exit = Exit::Reason(r::VMFUNC, 0);
const FAULTS: Exit = Exit::Done(0x100 + trap::UD as u64);

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let root = crate::expect::got(|| l2_kit::vmx!("vmfunc", in("rax") 0, in("rcx") 0));
    expect("vmfunc: in root operation", root, UD);
    let in_ring3 = user::ring3(vmxtest_vmfunc as *const () as u64, 0, 0);
    expect("vmfunc: in root operation, ring 3", Got::from(in_ring3), UD);
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    without(&mut guest, "without its control", FAULTS);
    if !setup::allowed_one(Kind::Secondary, secondary::VM_FUNCTIONS) {
        Check::new(&mut Serial, "vmfunc").fact("offered", false).end();
        return Ok(());
    }
    vmx::write(f::SECONDARY_CONTROLS, vmx::read(f::SECONDARY_CONTROLS) | u64::from(secondary::VM_FUNCTIONS));
    vmx::write(f::VM_FUNCTION_CONTROLS, 0);
    without(&mut guest, "without functions", EXITS);
    controls(&mut guest);
    if caps::get(setup::VMX_VMFUNC) & EPTP_SWITCHING == 0 {
        Check::new(&mut Serial, "vmfunc: EPTP switching").fact("offered", false).end();
        return Ok(());
    }
    let mut switching = Switching::new(guest);
    switching.checks();
    switching.functions();
    switching.entries();
    switching.bad_entries();
    switching.rings();
    switching.afterwards();
    switching.many();
    Ok(())
}

/// No function is enabled; above 63 there is none.
fn without(guest: &mut Guest, how: &str, wanted: Exit) {
    for (rax, exists) in [
        (0, true),
        (1, true),
        (31, true),
        (32, true),
        (63, true),
        (1 << 32, true),
        (64, false),
        (65, false),
        (0x100, false),
        (0x8000_0000, false),
        (0xFFFF_FFFF, false),
    ] {
        let wanted = if exists { wanted } else { FAULTS };
        let exit = execute(guest, rax, 0);
        let mut out = Serial;
        let check = Check::new(&mut out, format_args!("vmfunc {how}: {rax:#x}")).expect("result", exit, wanted);
        left(check, exit);
    }
}

/// What an exit of VMFUNC leaves.
fn left(check: Check<'_>, exit: Exit) {
    match exit {
        Exit::Reason(..) => check
            .expect("length", vmx::read(f::EXIT_INSTRUCTION_LENGTH), 3)
            .expect("idt_vectoring", vmx::read(f::IDT_VECTORING_INFO) >> 31, 0)
            .expect("at_vmfunc", instruction(vmx::read(f::GUEST_RIP)), 0xD4_010F)
            .end(),
        _ => check.end(),
    }
}

/// Three bytes of code.
fn instruction(at: u64) -> u32 {
    // SAFETY: the guest's code is this image's.
    unsafe { ptr::read_unaligned(at as *const u32) & 0xFF_FFFF }
}

fn entered(guest: &mut Guest) -> Exit {
    guest.execute(guest::nothing, 5)
}

const REFUSED: Exit = Exit::Refused(Outcome::FailValid(7));

/// Bits of the VM-function controls that are not offered, one by one.
fn controls(guest: &mut Guest) {
    let offered = caps::own_or_0(setup::VMX_VMFUNC);
    for bit in [0, 1, 2, 31, 32, 63] {
        if offered >> bit & 1 != 0 {
            continue;
        }
        vmx::write(f::VM_FUNCTION_CONTROLS, 1 << bit);
        let with = entered(guest);
        let secondary = vmx::read(f::SECONDARY_CONTROLS);
        vmx::write(f::SECONDARY_CONTROLS, secondary & !u64::from(secondary::VM_FUNCTIONS));
        let not_enabled = entered(guest);
        vmx::write(f::SECONDARY_CONTROLS, secondary);
        vmx::write(f::VM_FUNCTION_CONTROLS, 0);
        Check::new(&mut Serial, format_args!("VM-function controls with bit {bit}"))
            .expect("enabled", with, REFUSED)
            .expect("not_enabled", not_enabled, DONE)
            .end();
    }
}

struct Switching {
    guest: Guest,
    trees: [Ept; TREES],
    list: u64,
}

extern "C" fn read(_: u64) -> u64 {
    // SAFETY: the guest's page under test.
    unsafe { ptr::read_volatile(ALIAS as *const u64) }
}

/// VMFUNC 0 with the argument, and what the page holds then.
extern "C" fn switch_and_read(number: u64) -> u64 {
    switch(number);
    read(0)
}

fn switch(number: u64) {
    // SAFETY: EPTP switching between trees that all map this image one to one.
    unsafe { core::arch::asm!("vmfunc", in("rax") 0, in("rcx") number) };
}

/// Puts what is in entry 1 into entry 0 and switches to that.
extern "C" fn change_list_and_switch(list: u64) -> u64 {
    // SAFETY: the EPTP list, which is mapped one to one.
    unsafe {
        let list = list as *mut u64;
        let (first, second) = (list.read_volatile(), list.add(1).read_volatile());
        list.write_volatile(second);
        switch(0);
        list.write_volatile(first);
    }
    read(0)
}

/// Switches this often, by numbers that look like chance, and adds up what it reads.
extern "C" fn switch_often(times: u64) -> u64 {
    let mut sum = 0;
    for number in numbers(times) {
        switch(number);
        sum += read(0);
    }
    sum
}

fn numbers(times: u64) -> impl Iterator<Item = u64> {
    (0..times).scan(1u64, |state, _| {
        *state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
        Some(*state >> 55)
    })
}

impl Switching {
    fn new(guest: Guest) -> Self {
        let page = pages::take(PAGE, PAGE);
        pages::set_entry(guest.cr3, ALIAS, page | 3);
        let mut mark = MARK;
        let trees = [(); TREES].map(|()| {
            let target = pages::page();
            target[0] = mark;
            mark += 1;
            let tree = Ept::identity();
            tree.set(page, PAGE, pages::address(target) | ept::WRITE_BACK | rights::RWX);
            tree
        });
        let list = pages::page();
        for (entry, tree) in list.iter_mut().zip(trees.iter().cycle()) {
            *entry = tree.pointer();
        }
        let list = pages::address(list);
        vmx::write(f::EPTP_LIST, list);
        vmx::write(f::VM_FUNCTION_CONTROLS, EPTP_SWITCHING);
        vmx::write(f::EPTP, trees[0].pointer());
        Self { guest, trees, list }
    }

    fn set(&self, number: u64, eptp: u64) -> u64 {
        // SAFETY: our page; no guest runs.
        let list = unsafe { pages::at(self.list) };
        core::mem::replace(&mut list[number as usize], eptp)
    }

    fn back(&self) {
        vmx::write(f::EPTP, self.trees[0].pointer());
    }

    /// The tree that EPTP points to.
    fn tree(&self) -> u64 {
        let eptp = vmx::read(f::EPTP);
        self.trees.iter().position(|tree| tree.pointer() == eptp).map_or(0xFF, |tree| tree as u64)
    }

    /// What an entry asks of the list's address.
    fn checks(&mut self) {
        for (name, address) in [("misaligned", 8), ("beyond the address width", too_wide())] {
            vmx::write(f::EPTP_LIST, self.list | address);
            let refused = entered(&mut self.guest);
            vmx::write(f::VM_FUNCTION_CONTROLS, 0);
            let not_enabled = entered(&mut self.guest);
            vmx::write(f::VM_FUNCTION_CONTROLS, EPTP_SWITCHING);
            vmx::write(f::EPTP_LIST, self.list);
            Check::new(&mut Serial, format_args!("EPTP list {name}"))
                .expect("enabled", refused, REFUSED)
                .expect("not_enabled", not_enabled, DONE)
                .end();
        }
        let [old_primary, old_secondary] = [f::PRIMARY_CONTROLS, f::SECONDARY_CONTROLS].map(vmx::read);
        vmx::write(f::SECONDARY_CONTROLS, old_secondary & !u64::from(secondary::EPT));
        let without_ept = entered(&mut self.guest);
        vmx::write(f::SECONDARY_CONTROLS, old_secondary);
        vmx::write(f::PRIMARY_CONTROLS, old_primary & !u64::from(primary::SECONDARY));
        let without_secondary = entered(&mut self.guest);
        vmx::write(f::PRIMARY_CONTROLS, old_primary);
        Check::new(&mut Serial, "EPTP switching without EPT")
            .expect("enabled", without_ept, REFUSED)
            .expect("not_active", without_secondary, DONE)
            .end();
    }

    /// Function 0 alone is enabled.
    fn functions(&mut self) {
        for (rax, wanted) in [
            (0, DONE),
            (1 << 32, DONE),
            (0xFFFF_FFFF_0000_0000, DONE),
            (1, EXITS),
            (2, EXITS),
            (31, EXITS),
            (32, EXITS),
            (63, EXITS),
            (64, FAULTS),
            (0xFFFF_FFFF, FAULTS),
        ] {
            let exit = execute(&mut self.guest, rax, 0);
            let mut out = Serial;
            let check = Check::new(&mut out, format_args!("vmfunc with EPTP switching: {rax:#x}"));
            left(check.expect("result", exit, wanted).expect("tree", self.tree(), 0), exit);
        }
    }

    /// ECX chooses the entry.
    fn entries(&mut self) {
        for rcx in [
            0,
            1,
            2,
            7,
            11,
            12,
            255,
            256,
            510,
            511,
            512,
            513,
            1023,
            1 << 16,
            1 << 31,
            0xFFFF_FFFF,
            1 << 32 | 3,
            !0 << 32,
        ] {
            let ecx = rcx & 0xFFFF_FFFF;
            let exit = execute(&mut self.guest, 0, rcx);
            let (wanted, tree) = if ecx < ENTRIES { (DONE, ecx % TREES as u64) } else { (EXITS, 0) };
            let mut out = Serial;
            let check = Check::new(&mut out, format_args!("EPTP switching to {rcx:#x}"))
                .expect("result", exit, wanted)
                .expect("tree", self.tree(), tree);
            left(check, exit);
            self.back();
        }
    }

    /// Entries that no VM entry would accept.
    fn bad_entries(&mut self) {
        let good = self.trees[1].pointer();
        for (name, eptp) in [
            ("0", 0),
            ("all ones", !0),
            ("memory type 1", good & !7 | 1),
            ("memory type 2", good & !7 | 2),
            ("memory type 4", good & !7 | 4),
            ("memory type 5", good & !7 | 5),
            ("memory type 7", good | 7),
            ("a walk of 1 level", good & !0x38),
            ("a walk of 2 levels", good & !0x38 | 1 << 3),
            ("a walk of 3 levels", good & !0x38 | 2 << 3),
            ("a walk of 8 levels", good | 0x38),
            ("bit 8", good | 1 << 8),
            ("bit 9", good | 1 << 9),
            ("bit 10", good | 1 << 10),
            ("bit 11", good | 1 << 11),
            ("an address beyond the width", good | too_wide()),
            ("bit 63", good | 1 << 63),
        ] {
            let before = self.set(77, eptp);
            let exit = execute(&mut self.guest, 0, 77);
            let mut out = Serial;
            let check = Check::new(&mut out, format_args!("EPTP switching to an entry with {name}"))
                .expect("result", exit, EXITS)
                .expect("tree", self.tree(), 0);
            left(check, exit);
            self.set(77, before);
            self.back();
        }
        // Uncacheable tables are allowed where the capability says so. A machine whose capabilities are kept to those of
        // another goes by its own here, so there is nothing to see without.
        if caps::get(setup::VMX_EPT_VPID_CAP) & 1 << 8 != 0 {
            let before = self.set(77, good & !7);
            let exit = execute(&mut self.guest, 0, 77);
            Check::new(&mut Serial, "EPTP switching to uncacheable tables").expect("result", exit, DONE).end();
            self.set(77, before);
            self.back();
        }
    }

    /// VMFUNC needs no privilege and no 64-bit mode.
    fn rings(&mut self) {
        extern "C" fn ring3(rcx: u64) -> u64 {
            let trap = user::ring3(vmxtest_vmfunc as *const () as u64, rcx >> 32, rcx & 0xFFFF_FFFF);
            u64::from(trap.vector)
        }
        extern "C" fn compatibility(rcx: u64) -> u64 {
            let trap = user::compatibility(vmxtest_vmfunc32 as *const () as u64, (rcx >> 32) as u32, rcx as u32);
            u64::from(trap.vector)
        }
        let executed = Exit::Done(trap::BP.into());
        for (mode, program) in [("ring 3", ring3 as guest::Program), ("compatibility mode", compatibility)] {
            for (name, rcx, wanted, tree) in [
                ("a good entry", 4, executed, 4),
                ("no entry", ENTRIES, EXITS, 0),
                ("another function", 1 << 32, EXITS, 0),
                ("no function", 64 << 32, Exit::Done(trap::UD.into()), 0),
            ] {
                let exit = self.guest.execute(program, rcx);
                Check::new(&mut Serial, format_args!("vmfunc in {mode}: {name}"))
                    .expect("result", exit, wanted)
                    .expect("tree", self.tree(), tree)
                    .end();
                setup::write_guest_state(self.guest.cr3, true);
                self.back();
            }
        }
    }

    /// The new tree is the guest's from then on, and EPTP says so.
    fn afterwards(&mut self) {
        let (first, again) = (self.guest.execute(switch_and_read, 5), self.guest.execute(read, 0));
        let tree = self.tree();
        let vmcs = self.guest.vcpu.vmcs;
        let (cleared, loaded) = (vmx::vmclear(vmcs), vmx::vmptrld(vmcs));
        self.guest.vcpu.launched = false;
        let kept = self.tree();
        let relaunched = self.guest.execute(read, 0);
        self.back();
        let back = self.guest.execute(read, 0);
        Check::new(&mut Serial, "EPTP switching stays")
            .expect("first", first, Exit::Done(MARK + 5))
            .expect("again", again, Exit::Done(MARK + 5))
            .expect("tree", tree, 5)
            .expect("vmclear", cleared, Outcome::Succeed)
            .expect("vmptrld", loaded, Outcome::Succeed)
            .expect("kept", kept, 5)
            .expect("relaunched", relaunched, Exit::Done(MARK + 5))
            .expect("back", back, Exit::Done(MARK))
            .end();

        let changed = self.guest.execute(change_list_and_switch, self.list);
        Check::new(&mut Serial, "EPTP switching to an entry that the guest changed")
            .expect("result", changed, Exit::Done(MARK + 1))
            .expect("tree", self.tree(), 1)
            .end();
        self.back();

        let page = pages::address(pages::page());
        pages::set_entry(self.guest.cr3, ALIAS + PAGE, page | 3);
        self.trees[6].unmap(page, PAGE);
        extern "C" fn switch_and_read_next(number: u64) -> u64 {
            switch(number);
            // SAFETY: the guest's page under test.
            unsafe { ptr::read_volatile((ALIAS + PAGE) as *const u64) }
        }
        let violation = self.guest.execute(switch_and_read_next, 6);
        let violation = match violation {
            Exit::Reason(reason, qualification) => Exit::Reason(reason, qualification & 0x1FF),
            other => other,
        };
        Check::new(&mut Serial, "EPTP switching to a tree without the page")
            .expect("result", violation, Exit::Reason(r::EPT_VIOLATION, 0x181))
            .expect("physical", Hex(vmx::read(f::GUEST_PHYSICAL_ADDRESS)), Hex(page))
            .expect("linear", Hex(vmx::read(f::GUEST_LINEAR_ADDRESS)), Hex(ALIAS + PAGE))
            .expect("tree", self.tree(), 6)
            .end();
        self.trees[6].map(page, PAGE, rights::RWX);
        Check::new(&mut Serial, "EPTP switching to a tree that gets the page")
            .expect("result", self.guest.run(), Exit::Done(0))
            .end();
        self.back();
    }

    /// Many switches in one go.
    fn many(&mut self) {
        for times in [1, 10, 100, 1000] {
            let result = self.guest.execute(switch_often, times);
            let wanted = numbers(times).map(|number| MARK + number % TREES as u64).sum();
            let last = numbers(times).last().map_or(0, |number| number % TREES as u64);
            Check::new(&mut Serial, format_args!("EPTP switching {times} times"))
                .expect("result", result, Exit::Done(wanted))
                .expect("tree", self.tree(), last)
                .end();
            self.back();
        }
    }
}
