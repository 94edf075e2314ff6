//! State that VM entries and exits switch, and that a guest also reaches by RDMSR and WRMSR or by MOV DR: one row each.
//!
//! A row says where the value of each level lies, which controls load and save it, whose writes exit, and what becomes of it
//! where vmcs12 does not ask for a load or a save. All else follows from it: nvmx's own controls, the MSR bitmaps
//! (`vmcs::msrs`), what nvmx knows of L2's MSRs (`vmcs::tracked`), what a reflected exit loads, and what is carried between
//! the levels (`vmcs::inherit`).
//!
//! The last rows are resident: the state does nothing while nvmx runs, since nvmx's CR4 has neither CET nor PKS nor UINTR, or what
//! it does is the guest's business: performance counters. So nvmx's VMCSs neither save nor load it for nvmx.
//! vmcs02 loads L3's values where vmcs12 asks, and on an exit that goes to nvmx alone they stay where they are. Where vmcs12 asks
//! that the exit loads L2's values, the next entry of vmcs01 loads them, once (`vmcs::once`). Nobody else pays for it. The processor
//! saves all of it on each exit, in vmcs02 for L2 to read; counters only by a control, which vmcs02 has too where the entry loads them
//! (`vmcs::inherit` gives L2 its value back).
//!
//! Source: Intel SDM vol. 3C, "VM-Exit Controls", "VM-Entry Controls", "Loading Guest State", "Saving Guest State", "Loading
//! Host State"; vol. 4, table "IA-32 Architectural MSRs".

use crate::vmx::controls::{EntryControls, ExitControls};
use crate::vmx::field::{Field, Home};
use crate::x86::msr;

/// Where a VM exit takes the host's value from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Host {
    /// From this field.
    Field(Field),
    /// It is always this.
    Constant(u64),
}

/// Whose writes exit to nvmx, beyond those that L2 asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exits {
    /// Nobody's.
    Never,
    /// L2's.
    ForGuest,
    /// L2's and L3's.
    ForBoth,
}

/// Which values a write takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Takes {
    /// nvmx does not see writes.
    Unseen,
    /// The low 32 bits count.
    Low32,
    /// A canonical address.
    Canonical,
    /// Eight memory types.
    Pat,
    /// The bits of IA32_EFER that are defined, by its own rules.
    Efer,
}

/// What is in the processor while nvmx runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InNvmx {
    /// A value of nvmx's: its VMCSs always load and save.
    Own,
    /// The guest's, which does nothing there.
    Resident,
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub struct Switched {
    /// The name in the SDM.
    pub name: &'static str,
    /// Index of the MSR; `None` for a debug register.
    pub msr: Option<u32>,
    /// The field of the guest-state area.
    pub guest: Field,
    /// The host's value.
    pub host: Host,
    /// The VM-entry control that loads the guest's value; without one it is always loaded.
    pub entry_load: EntryControls,
    /// The VM-exit control that saves the guest's value; without one it is always saved.
    pub exit_save: ExitControls,
    /// The VM-exit control that loads the host's value; without one it is always loaded.
    pub exit_load: ExitControls,
    /// What nvmx runs with.
    pub in_nvmx: InNvmx,
    /// Whose writes exit.
    pub exits: Exits,
    /// What a write that exits takes.
    pub takes: Takes,
    /// Why writes exit, or do not.
    pub why: &'static str,
}

const NO_ENTRY: EntryControls = EntryControls::empty();
const NO_EXIT: ExitControls = ExitControls::empty();

const KNOWN: &str = "L2 writes it seldom, and an exit of L3 need not read it then";
const NESTED_WRITES_PAT: &str = "both levels write it seldom, and an exit of L3 need read neither value then";
const ITS_OWN: &str = "an exit of L3 loads it or sets it in any case";
const STAYS: &str = "nvmx's CR4 has nothing that would use it";
const RUN_ON: &str = "counters run on while nvmx runs";

macro_rules! switched {
    ($( $item:ident = $name:literal, $msr:expr, $guest:ident, $host:expr, $entry_load:expr, $exit_save:expr,
        $exit_load:expr, $in_nvmx:ident, $exits:ident, $takes:ident, $why:expr; )*) => {
        /// The rows by name.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        #[allow(missing_docs)]
        pub enum Item { $( $item, )* }

        impl Item {
            /// All of them, in the order of [`TABLE`].
            pub const ALL: [Item; TABLE.len()] = [ $( Item::$item, )* ];
        }

        /// All rows. Those whose writes exit come first.
        pub const TABLE: [Switched; [ $( Item::$item, )* ].len()] = [ $( Switched {
            name: $name,
            msr: $msr,
            guest: Field::$guest,
            host: $host,
            entry_load: $entry_load,
            exit_save: $exit_save,
            exit_load: $exit_load,
            in_nvmx: InNvmx::$in_nvmx,
            exits: Exits::$exits,
            takes: Takes::$takes,
            why: $why,
        }, )* ];
    };
}

switched! {
    SysenterCs = "IA32_SYSENTER_CS", Some(0x174), GUEST_SYSENTER_CS, Host::Field(Field::HOST_IA32_SYSENTER_CS),
        NO_ENTRY, NO_EXIT, NO_EXIT, Own, ForGuest, Low32, KNOWN;
    SysenterEsp = "IA32_SYSENTER_ESP", Some(0x175), GUEST_SYSENTER_ESP, Host::Field(Field::HOST_IA32_SYSENTER_ESP),
        NO_ENTRY, NO_EXIT, NO_EXIT, Own, ForGuest, Canonical, KNOWN;
    SysenterEip = "IA32_SYSENTER_EIP", Some(0x176), GUEST_SYSENTER_EIP, Host::Field(Field::HOST_IA32_SYSENTER_EIP),
        NO_ENTRY, NO_EXIT, NO_EXIT, Own, ForGuest, Canonical, KNOWN;
    Pat = "IA32_PAT", Some(msr::IA32_PAT), GUEST_IA32_PAT, Host::Field(Field::HOST_IA32_PAT),
        EntryControls::LOAD_PAT, ExitControls::SAVE_PAT, ExitControls::LOAD_PAT, Own, ForBoth, Pat, NESTED_WRITES_PAT;
    Efer = "IA32_EFER", Some(msr::IA32_EFER), GUEST_IA32_EFER, Host::Field(Field::HOST_IA32_EFER),
        EntryControls::LOAD_EFER, ExitControls::SAVE_EFER, ExitControls::LOAD_EFER, Own, ForGuest, Efer, KNOWN;
    Debugctl = "IA32_DEBUGCTL", Some(0x1D9), GUEST_IA32_DEBUGCTL, Host::Constant(0),
        EntryControls::LOAD_DEBUG_CONTROLS, ExitControls::SAVE_DEBUG_CONTROLS, NO_EXIT, Own, Never, Unseen, ITS_OWN;
    Dr7 = "DR7", None, GUEST_DR7, Host::Constant(0x400),
        EntryControls::LOAD_DEBUG_CONTROLS, ExitControls::SAVE_DEBUG_CONTROLS, NO_EXIT, Own, Never, Unseen, ITS_OWN;
    FsBase = "IA32_FS_BASE", Some(0xC000_0100), GUEST_FS_BASE, Host::Field(Field::HOST_FS_BASE),
        NO_ENTRY, NO_EXIT, NO_EXIT, Own, Never, Unseen, ITS_OWN;
    GsBase = "IA32_GS_BASE", Some(0xC000_0101), GUEST_GS_BASE, Host::Field(Field::HOST_GS_BASE),
        NO_ENTRY, NO_EXIT, NO_EXIT, Own, Never, Unseen, ITS_OWN;
    PerfGlobalCtrl = "IA32_PERF_GLOBAL_CTRL", Some(0x38F), GUEST_IA32_PERF_GLOBAL_CTRL,
        Host::Field(Field::HOST_IA32_PERF_GLOBAL_CTRL), EntryControls::LOAD_PERF_GLOBAL_CTRL,
        ExitControls::SAVE_PERF_GLOBAL_CTRL, ExitControls::LOAD_PERF_GLOBAL_CTRL, Resident, Never, Unseen, RUN_ON;
    SCet = "IA32_S_CET", Some(0x6A2), GUEST_S_CET, Host::Field(Field::HOST_S_CET),
        EntryControls::LOAD_CET, NO_EXIT, ExitControls::LOAD_CET, Resident, Never, Unseen, STAYS;
    Ssp = "SSP", None, GUEST_SSP, Host::Field(Field::HOST_SSP),
        EntryControls::LOAD_CET, NO_EXIT, ExitControls::LOAD_CET, Resident, Never, Unseen, STAYS;
    SspTable = "IA32_INTERRUPT_SSP_TABLE_ADDR", Some(0x6A8), GUEST_INTR_SSP_TABLE, Host::Field(Field::HOST_INTR_SSP_TABLE),
        EntryControls::LOAD_CET, NO_EXIT, ExitControls::LOAD_CET, Resident, Never, Unseen, STAYS;
    Pkrs = "IA32_PKRS", Some(0x6E1), GUEST_IA32_PKRS, Host::Field(Field::HOST_IA32_PKRS),
        EntryControls::LOAD_PKRS, NO_EXIT, ExitControls::LOAD_PKRS, Resident, Never, Unseen, STAYS;
    Uinv = "UINV", None, GUEST_UINV, Host::Constant(0),
        EntryControls::LOAD_UINV, NO_EXIT, ExitControls::CLEAR_UINV, Resident, Never, Unseen, STAYS;
}

impl Item {
    /// Its row.
    #[inline(always)]
    pub const fn row(self) -> &'static Switched {
        const ROWS: &[Switched; TABLE.len()] = &TABLE;
        &ROWS[self as usize]
    }

    /// The MSR with this index, if entries and exits of nvmx switch it.
    pub fn of_msr(index: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|item| item.row().msr == Some(index) && !item.is_resident())
    }

    /// It stays in the processor while nvmx runs.
    pub const fn is_resident(self) -> bool {
        matches!(self.row().in_nvmx, InNvmx::Resident)
    }

    /// nvmx knows L2's value: its writes exit.
    pub const fn is_tracked(self) -> bool {
        !matches!(self.row().exits, Exits::Never)
    }

    /// vmcs12 can leave it as it is in the processor, and its field lies in vmcs02.
    pub const fn is_carried_in_vmcs02(self) -> bool {
        let row = self.row();
        !row.entry_load.is_empty() && !self.is_resident() && !matches!(row.guest.home(), Home::Cache)
    }
}

/// How many items nvmx knows L2's values of: the first ones.
pub const TRACKED: usize = count_tracked();

const fn count_tracked() -> usize {
    let (mut i, mut count) = (0, 0);
    while i < Item::ALL.len() {
        if Item::ALL[i].is_tracked() {
            assert!(count == i, "rows whose writes exit come first");
            count += 1;
        }
        i += 1;
    }
    count
}

/// The VM-exit controls that nvmx sets in each of its VMCSs: its own values must come and go.
pub const fn exit_controls() -> ExitControls {
    exit_controls_of(InNvmx::Own)
}

/// The VM-entry controls, likewise.
pub const fn entry_controls() -> EntryControls {
    entry_controls_of(InNvmx::Own)
}

/// The VM-exit controls that load what is resident.
pub const RESIDENT_EXIT: ExitControls = exit_controls_of(InNvmx::Resident);

/// The VM-entry controls that load what is resident.
pub const RESIDENT_ENTRY: EntryControls = entry_controls_of(InNvmx::Resident);

const fn exit_controls_of(in_nvmx: InNvmx) -> ExitControls {
    let (mut controls, mut i) = (ExitControls::empty(), 0);
    while i < TABLE.len() {
        if TABLE[i].in_nvmx as u8 == in_nvmx as u8 {
            controls = controls.union(TABLE[i].exit_save).union(TABLE[i].exit_load);
        }
        i += 1;
    }
    controls
}

const fn entry_controls_of(in_nvmx: InNvmx) -> EntryControls {
    let (mut controls, mut i) = (EntryControls::empty(), 0);
    while i < TABLE.len() {
        if TABLE[i].in_nvmx as u8 == in_nvmx as u8 {
            controls = controls.union(TABLE[i].entry_load);
        }
        i += 1;
    }
    controls
}

/// The resident rows that an exit with these controls loads for the host.
pub fn resident_loaded_by(exit: ExitControls) -> impl Iterator<Item = &'static Switched> {
    Item::ALL
        .into_iter()
        .filter(|item| item.is_resident())
        .map(Item::row)
        .filter(move |row| exit.contains(row.exit_load))
}

/// What the controls of a vmcs12 ask for of one item.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Asked {
    /// The entry loads it. If not, L2's own value goes on in L3.
    pub loaded: bool,
    /// The exit saves it. If not, the field reads after the exit as before the entry.
    pub saved: bool,
    /// The exit loads the host's value. If not, L3's value goes on in L2.
    pub host_loaded: bool,
}

impl Asked {
    /// By the controls.
    pub const fn of(item: Item, entry: EntryControls, exit: ExitControls) -> Self {
        let row = item.row();
        Self {
            loaded: entry.contains(row.entry_load),
            saved: exit.contains(row.exit_save),
            host_loaded: exit.contains(row.exit_load),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::caps;
    use crate::rules::msr_policy::{self, Verdict};
    use crate::vmx::field::Area;
    use crate::vmx::requirements::REQUIREMENTS;

    #[test]
    fn an_msr_is_switched_by_this_table_if_the_policy_says_so() {
        let policy = |index| {
            let row = msr_policy::row(index);
            (row.read == Verdict::Switched, row.write == Verdict::Switched)
        };
        for index in msr_policy::IN_REACH.into_iter().flatten() {
            let here = Item::of_msr(index).is_some();
            assert_eq!(policy(index), (here, here), "{index:#x}");
        }
    }

    #[test]
    fn what_vmcs12_need_not_ask_for_is_always_loaded_and_saved() {
        for item in Item::ALL {
            let nothing = Asked::of(item, EntryControls::empty(), ExitControls::empty());
            let row = item.row();
            assert_eq!(nothing.loaded, row.entry_load.is_empty(), "{}", row.name);
            assert_eq!(nothing.saved, row.exit_save.is_empty(), "{}", row.name);
            assert_eq!(nothing.host_loaded, row.exit_load.is_empty(), "{}", row.name);
            let all = Asked::of(item, EntryControls::all(), ExitControls::all());
            assert_eq!(all, Asked { loaded: true, saved: true, host_loaded: true }, "{}", row.name);
        }
    }

    /// SDM tables "Definitions of Primary VM-Exit Controls" and "Definitions of VM-Entry Controls", by bit.
    #[test]
    fn each_control_is_about_the_item_of_its_row() {
        for (item, load, save, host) in [
            (Item::Pat, 14, Some(18), Some(19)),
            (Item::Efer, 15, Some(20), Some(21)),
            (Item::Debugctl, 2, Some(2), None),
            (Item::Dr7, 2, Some(2), None),
            (Item::PerfGlobalCtrl, 13, Some(30), Some(12)),
            (Item::SCet, 20, None, Some(28)),
            (Item::Ssp, 20, None, Some(28)),
            (Item::SspTable, 20, None, Some(28)),
            (Item::Pkrs, 22, None, Some(29)),
            (Item::Uinv, 19, None, Some(27)),
        ] {
            let row = item.row();
            assert_eq!(row.entry_load.bits(), 1 << load, "{}", row.name);
            assert_eq!(row.exit_save.bits(), save.map_or(0, |bit: u32| 1 << bit), "{}", row.name);
            assert_eq!(row.exit_load.bits(), host.map_or(0, |bit| 1 << bit), "{}", row.name);
        }
    }

    /// Debug controls are in no row of the requirements: every processor has them.
    #[test]
    fn a_control_of_the_table_is_offered_and_required_of_the_processor() {
        for item in Item::ALL {
            let row = item.row();
            for control in row.entry_load {
                assert!(caps::ENTRY.iter().any(|offer| offer.control == control), "{}", row.name);
            }
            for control in row.exit_save | row.exit_load {
                assert!(caps::EXIT.iter().any(|offer| offer.control == control), "{}", row.name);
            }
            let required = REQUIREMENTS.iter().any(|r| r.text.contains(row.name));
            let debug = row.entry_load == EntryControls::LOAD_DEBUG_CONTROLS;
            assert_eq!(required, !row.entry_load.is_empty() && !debug && !item.is_resident(), "{}", row.name);
        }
    }

    /// Of what is resident L2 reads what the exit saved, and writes what the entry loads, in vmcs02 itself; nvmx does not set its
    /// controls, and an instruction reaches it without an exit.
    #[test]
    fn what_is_resident_lives_in_vmcs02_and_its_host_values_in_the_copy() {
        for row in Item::ALL.into_iter().filter(|item| item.is_resident()).map(Item::row) {
            assert_eq!((row.guest.area(), row.guest.home()), (Area::Guest, Home::Vmcs02), "{}", row.name);
            if let Host::Field(host) = row.host {
                assert_eq!((host.area(), host.home()), (Area::Host, Home::Cache), "{}", row.name);
            }
            if let Some(index) = row.msr {
                let policy = msr_policy::row(index);
                assert_eq!((policy.read, policy.write), (Verdict::Passes, Verdict::Passes), "{}", row.name);
            }
        }
        assert!(!exit_controls().intersects(RESIDENT_EXIT) && !entry_controls().intersects(RESIDENT_ENTRY));
        assert_eq!(
            (RESIDENT_ENTRY.bits(), RESIDENT_EXIT.bits()),
            (1 << 13 | 1 << 19 | 1 << 20 | 1 << 22, 1 << 12 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30)
        );
    }
}
