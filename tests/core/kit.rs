//! What programs of L2 share.

use nvmx::rules::caps::offered;
pub use nvmx::vmx::Field::{self, *};
pub use nvmx::vmx::Fields;
use nvmx::vmx::region::REVISION;
use nvmx_machine::guest::{Guest, Op, Outcome};
use nvmx_machine::second::core_support::valid_vmcs12;
use nvmx_machine::world::End;
use nvmx_machine::{Setup, World};

pub const VMXON: u64 = 0x1_0000;
pub const VMCS: u64 = 0x1_1000;
pub const OTHER: u64 = 0x1_2000;
/// L2's EPT for L3: one to one, 4 KiB pages for the first 2 MiB, large ones after that.
pub const EPT: u64 = 0x20_0000;
pub const HANDLER: u64 = 0x11_0000;
/// A page of L3's.
pub const PAGE: u64 = 0x3_0000;

/// Where [`EPT`] has the entry of an address below 2 MiB.
pub fn entry(at: u64) -> u64 {
    EPT + 0x3000 + (at >> 12) * 8
}

/// CR4.VMXE and VMXON.
pub async fn vmxon(g: &Guest) {
    g.poke_u32(VMXON, REVISION);
    g.run(Op::MovToCr4(0x2020)).await;
    g.run(Op::MovToCr0(0x8001_0031)).await;
    g.run(Op::Vmxon(VMXON)).await;
    assert_eq!(g.flags(), 0, "VMXON");
}

/// A region that VMPTRLD makes current.
pub async fn make_current(g: &Guest, at: u64) {
    g.poke_u32(at, REVISION);
    g.run(Op::Vmclear(at)).await;
    g.run(Op::Vmptrld(at)).await;
    assert_eq!(g.flags(), 0, "VMPTRLD");
}

/// L2's EPT, at [`EPT`].
pub fn build_ept(g: &Guest) {
    (0..3).for_each(|level| g.poke(EPT + 0x1000 * level, (EPT + 0x1000 * (level + 1)) | 7));
    (1..8).for_each(|n| g.poke(EPT + 0x2000 + 8 * n, n << 21 | 0xB7));
    (0..512).for_each(|n| g.poke(EPT + 0x3000 + 8 * n, n << 12 | 0x37));
}

/// The fields of a vmcs12 that every check lets through on every machine, and a 64-bit guest.
pub fn valid() -> Vec<(Field, u64)> {
    // Without shadowing, so that all machines have the controls.
    let caps = offered(&nvmx_machine::world::without_shadowing());
    let mut v = valid_vmcs12(&caps);
    v.set(EPT_POINTER, EPT | 3 << 3 | 6).set(HOST_RIP, HANDLER).set(HOST_CR3, 0x1000).set(GUEST_CR3, 0x1000);
    v.set(HOST_CR0, 0x8001_0031).set(GUEST_CR0, 0x8001_0031);
    Field::ALL
        .iter()
        .filter(|field| caps.has_field(**field) && !field.is_read_only())
        .map(|field| (*field, v.get(*field)))
        .collect()
}

/// VMXON, a current VMCS with valid fields and these changes, an EPT.
pub async fn hypervisor(g: &Guest, changes: &[(Field, u64)]) {
    build_ept(g);
    vmxon(g).await;
    make_current(g, VMCS).await;
    write(g, &valid()).await;
    write(g, changes).await;
}

/// [`hypervisor`], with a shadow VMCS at [`OTHER`] whose bitmaps let these encodings pass.
pub async fn with_shadow_vmcs(g: &Guest, open: &[u64], changes: &[(Field, u64)]) {
    const BITMAP: u64 = 0x2_0000;
    g.poke_u32(OTHER, REVISION | 1 << 31);
    (0..512).for_each(|n| g.poke(BITMAP + 8 * n, u64::MAX));
    for encoding in open {
        let at = BITMAP + encoding / 64 * 8;
        g.poke(at, g.peek(at) & !(1 << (encoding % 64)));
    }
    let own = [
        control(SECONDARY_VM_EXEC_CONTROL, 1 << 14, 0),
        (VMREAD_BITMAP, BITMAP),
        (VMWRITE_BITMAP, BITMAP),
        (VMCS_LINK_POINTER, OTHER),
    ];
    hypervisor(g, &[&own[..], changes].concat()).await;
}

pub async fn write(g: &Guest, fields: &[(Field, u64)]) {
    for (field, value) in fields {
        assert!(g.vmwrite(*field, *value).await, "VMWRITE of {field}");
    }
}

/// VMLAUNCH that must enter.
pub async fn launch(g: &Guest) {
    assert_eq!(g.run(Op::Vmlaunch).await, Outcome::Left, "VMLAUNCH: error {}", g.error().await);
}

/// Exit information that every handler reads.
pub async fn exit_information(g: &Guest) -> Vec<(Field, u64)> {
    let mut read = vec![];
    for field in [
        VM_EXIT_REASON,
        EXIT_QUALIFICATION,
        VM_EXIT_INTR_INFO,
        VM_EXIT_INTR_ERROR_CODE,
        VM_EXIT_INSTRUCTION_LEN,
        VMX_INSTRUCTION_INFO,
        IDT_VECTORING_INFO_FIELD,
        GUEST_RIP,
        GUEST_RSP,
        GUEST_RFLAGS,
        GUEST_CR0,
        GUEST_CR3,
        GUEST_CR4,
        GUEST_IA32_EFER,
        GUEST_IA32_PAT,
        GUEST_INTERRUPTIBILITY_INFO,
        GUEST_ACTIVITY_STATE,
        VM_ENTRY_CONTROLS,
        VM_ENTRY_INTR_INFO_FIELD,
        GUEST_DR7,
        GUEST_IA32_DEBUGCTL,
    ] {
        read.push((field, g.vmread(field).await.unwrap_or(0xBAD)));
    }
    // Of an exit that no instruction brings the two are undefined.
    if let [(_, 0 | 1 | 2 | 7 | 8 | 37 | 48 | 49 | 52 | 66), ..] = read[..] {
        read.retain(|(field, _)| !matches!(field, VM_EXIT_INSTRUCTION_LEN | VMX_INSTRUCTION_INFO));
    }
    read
}

/// Leaves the guest by VMCALL, which is always an exit.
pub async fn leave(g: &Guest) {
    assert_eq!(g.run(Op::Vmcall).await, Outcome::Left);
}

/// After an exit: everything that L2 sees, and what VMREAD says of it.
pub async fn look(g: &Guest, what: &str) {
    g.see(what);
    g.note(format!("{what}: {:x?}", exit_information(g).await));
}

/// The value of a control field of [`valid`] with other bits.
pub fn control(field: Field, set: u64, clear: u64) -> (Field, u64) {
    let value = valid().into_iter().find(|(f, _)| *f == field).map_or(0, |(_, value)| value);
    (field, value & !clear | set)
}

/// 32-bit code of L2 without paging, and a GDT with two tasks: 20H, which runs, at 3000H, and 28H at 4000H.
pub fn two_tasks(g: &Guest) {
    for (n, entry) in [
        (1, 0x00CF_9A00_0000_FFFFu64),
        (2, 0x00CF_9200_0000_FFFF),
        (4, 0x8B << 40 | 0x3000_0067),
        (5, 0x89 << 40 | 0x4000_0067),
    ] {
        g.poke(0xA000 + 8 * n, entry);
    }
    for (field, value) in [
        (GUEST_CR0, 0x31),
        (GUEST_IA32_EFER, 0),
        (GUEST_CS_AR_BYTES, 0xC09B),
        (GUEST_GDTR_BASE, 0xA000),
        (GUEST_GDTR_LIMIT, 0x2F),
        (GUEST_TR_SELECTOR, 0x20),
        (GUEST_TR_BASE, 0x3000),
    ] {
        g.set(field, value);
    }
}

/// Runs a program under nvmx by every strategy, for what no program does on the bare machine.
pub fn everywhere<F: Future<Output = ()> + 'static>(program: impl Fn(Guest) -> F + Clone + 'static) {
    for setup in Setup::all() {
        let mut world = World::new(setup);
        let end = world.boot(program.clone());
        assert!(matches!(end, End::Over), "{:?} {:?}: {end:?}", setup.strategy, setup.storage);
    }
}
