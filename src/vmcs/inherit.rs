//! IA32_EFER, IA32_PAT, DR7 and IA32_DEBUGCTL where vmcs12 neither loads nor saves them.
//!
//! On the machine that L2 believes in, such state simply stays in the processor across VM entry and VM exit. Under nvmx the
//! processor always loads and saves it (nvmx's own values must come and go), so it is carried between vmcs01 and vmcs02
//! here, and the field that L2 sees in vmcs12 keeps L2's value.
//!
//! IA32_PAT is kept apart: hypervisors that leave it alone are common, and so L2's field lives in nvmx's copy of vmcs12.
//! IA32_PERF_GLOBAL_CTRL stays in the processor as such state does. But where the entry loads it vmcs02 saves it as well, and L2's field is
//! to read as before if its own exit controls do not.
//! Source: SDM vol. 3C, "Loading Guest State", "Saving Guest State", "Loading Host State".

use crate::hw::vmx::Vmx;
use crate::rules::switched::{Asked, Item};
use crate::vmcs::kept::Kept;
use crate::vmcs::tracked::{HostValues, Tracked};
use crate::vmcs::vmcs12::Vmcs12;
use crate::vmx::controls::{EntryControls, ExitControls};
use crate::vmx::{Field, FieldAccess};
use crate::x86::{Cr0, efer};

/// IA32_EFER.LME and LMA, which VM exits set from a control in any case, and VM entries too but for the LME of a guest
/// without paging.
const EFER_LONG_MODE: u64 = efer::LME | efer::LMA;

/// What is carried between vmcs01 and vmcs02.
const CARRIED: [Item; 3] = [Item::Efer, Item::Dr7, Item::Debugctl];
const FIELDS: [Field; 3] = [CARRIED[0].row().guest, CARRIED[1].row().guest, CARRIED[2].row().guest];
const EFER: usize = 0;
const ALL: u8 = 0b111;
/// Those that L2 changes without an exit.
const DEBUG: u8 = ALL & !(1 << EFER);

/// What vmcs12 asks for, and the values on their way.
#[derive(Clone, Copy)]
pub struct Inherited {
    /// Bit i: the VM entry loads item i from vmcs12.
    loaded: u8,
    /// Bit i: the VM exit saves item i to vmcs12.
    saved: u8,
    /// The VM exit loads IA32_EFER from vmcs12's host area.
    host_efer: bool,
    loads_pat: bool,
    saves_pat: bool,
    host_pat: bool,
    long_mode_guest: bool,
    /// The guest may be without paging.
    unrestricted: bool,
    long_mode_host: bool,
    /// The value in the processor.
    live: [u64; 3],
    /// The value of vmcs12's field.
    original: [u64; 3],
    /// IA32_PAT in the processor when L3 leaves.
    live_pat: u64,
    /// The VM entry loads IA32_PERF_GLOBAL_CTRL and the VM exit does not save it.
    keeps_counters: bool,
    /// What L2 has in its field then.
    counters: u64,
}

impl Default for Inherited {
    fn default() -> Self {
        Inherited {
            loaded: ALL,
            saved: ALL,
            host_efer: true,
            loads_pat: true,
            saves_pat: true,
            host_pat: true,
            long_mode_guest: true,
            unrestricted: false,
            long_mode_host: true,
            live: [0; 3],
            original: [0; 3],
            live_pat: 0,
            keeps_counters: false,
            counters: 0,
        }
    }
}

impl Inherited {
    /// Notes what vmcs12's controls ask for.
    pub fn plan(&mut self, entry: EntryControls, exit: ExitControls, unrestricted: bool) {
        let asked = |item| Asked::of(item, entry, exit);
        let bits =
            |of: fn(Asked) -> bool| (0..).zip(CARRIED).fold(0, |bits, (i, item)| bits | u8::from(of(asked(item))) << i);
        self.loaded = bits(|asked| asked.loaded);
        self.saved = bits(|asked| asked.saved);
        self.host_efer = asked(Item::Efer).host_loaded;
        let pat = asked(Item::Pat);
        (self.loads_pat, self.saves_pat, self.host_pat) = (pat.loaded, pat.saved, pat.host_loaded);
        let counters = asked(Item::PerfGlobalCtrl);
        self.keeps_counters = counters.loaded && !counters.saved;
        self.long_mode_guest = entry.contains(EntryControls::IA32E_MODE_GUEST);
        self.unrestricted = unrestricted;
        self.long_mode_host = exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
    }

    /// Something is carried besides IA32_PAT, which a guest that does not write it finds and leaves as the entry before did.
    pub const fn carries(&self) -> bool {
        let quiet = if self.loads_pat { self.host_pat } else { !self.saves_pat && !self.host_pat };
        self.loaded & self.saved != ALL || !self.host_efer || !quiet || self.keeps_counters
    }

    /// L2 is in IA-32e mode behind an exit.
    pub const fn long_mode_host(&self) -> bool {
        self.long_mode_host
    }

    /// The guest may change its mode, and the processor the control that goes with it.
    #[inline(always)]
    pub const fn is_unrestricted(&self) -> bool {
        self.unrestricted
    }

    fn items(bits: u8) -> impl Iterator<Item = usize> {
        (0..FIELDS.len()).filter(move |i| bits >> i & 1 == 1)
    }

    /// Before the entry, vmcs01 current: what L2 leaves in the processor, but for what nvmx knows.
    #[inline(always)]
    pub fn leave_guest(&mut self, vmx: &mut Vmx) {
        if self.loaded & DEBUG == DEBUG {
            return;
        }
        for i in Self::items(DEBUG & !self.loaded) {
            self.live[i] = vmx.read(FIELDS[i]);
        }
    }

    /// Before the entry, vmcs02 holding L2's values.
    #[inline(always)]
    pub fn enter_nested(&mut self, vmcs02: &mut impl FieldAccess, vmcs12: &Vmcs12, pat02: &mut Kept, guest: &Tracked) {
        pat02.put(vmcs02, if self.loads_pat { vmcs12.get(Field::GUEST_IA32_PAT) } else { guest.pat() });
        if self.keeps_counters {
            self.counters = vmcs02.read(Field::GUEST_IA32_PERF_GLOBAL_CTRL);
        }
        if self.loaded & self.saved == ALL {
            return;
        }
        if self.loaded >> EFER & 1 == 0 {
            let paging = !self.unrestricted || vmcs02.read(Field::GUEST_CR0) & Cr0::PG.bits() != 0;
            self.live[EFER] = entered(guest.efer(), self.long_mode_guest, paging);
        }
        for i in Self::items(ALL & !(self.loaded & self.saved)) {
            self.original[i] = vmcs02.read(FIELDS[i]);
            if self.loaded >> i & 1 == 0 {
                vmcs02.write(FIELDS[i], self.live[i]);
            }
        }
    }

    /// After an exit of L3 that goes to L2.
    #[inline(always)]
    pub fn leave_nested(&mut self, vmcs02: &mut impl FieldAccess, vmcs12: &mut Vmcs12, pat02: &mut Kept) {
        self.live_pat = pat02.get(vmcs02);
        if self.saves_pat {
            vmcs12.set(Field::GUEST_IA32_PAT, self.live_pat);
        }
        if !self.host_efer {
            self.live[EFER] = vmcs02.read(Field::GUEST_IA32_EFER);
        }
        if self.keeps_counters {
            vmcs02.write(Field::GUEST_IA32_PERF_GLOBAL_CTRL, self.counters);
        }
        if self.saved != ALL {
            for i in Self::items(ALL & !self.saved) {
                vmcs02.write(FIELDS[i], self.original[i]);
            }
        }
    }

    /// After an entry that failed late, vmcs02 current: what L2 finds in the processor. The guest state was loaded only if
    /// the entry came as far as its MSR area.
    pub fn leave_failed_entry(&mut self, vmx: &mut Vmx, pat02: &mut Kept, guest: &Tracked, guest_state_loaded: bool) {
        if guest_state_loaded {
            self.live_pat = pat02.get(vmx);
            self.live[EFER] = vmx.read(Field::GUEST_IA32_EFER);
        } else {
            self.live_pat = guest.pat();
            self.live[EFER] = guest.efer();
        }
        self.undo(vmx);
    }

    /// The entry that failed late had loaded these values from its MSR area.
    pub fn msrs_loaded(&mut self, pat: Option<u64>, efer: Option<u64>) {
        self.live_pat = pat.unwrap_or(self.live_pat);
        // LMA takes no write, and both bits are the exit's.
        self.live[EFER] = efer.unwrap_or(self.live[EFER]);
    }

    /// After an entry that failed: vmcs02, which is current, gets L2's values back.
    pub fn undo(&mut self, vmx: &mut Vmx) {
        for i in Self::items(ALL & !self.loaded) {
            vmx.write(FIELDS[i], self.original[i]);
        }
    }

    /// The exit of L3 gives L2 these values; what it does not load goes on as L3 left it.
    #[inline(always)]
    pub fn leave_to_guest(&self, host: &mut HostValues) {
        if !self.host_efer {
            *host.value(Item::Efer) = long_mode(self.live[EFER], self.long_mode_host);
        }
        if !self.host_pat {
            *host.value(Item::Pat) = self.live_pat;
        }
    }

    /// Another vmcs12 gets vmcs02.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

/// L3's IA32_EFER by an entry that does not load it: LMA is the control, and so is LME with paging; without, LME stays
/// (SDM, "Loading Guest Control Registers, Debug Registers, and MSRs").
fn entered(old: u64, long_mode_guest: bool, paging: bool) -> u64 {
    match paging {
        true => long_mode(old, long_mode_guest),
        false => old & !efer::LMA | if long_mode_guest { efer::LMA } else { 0 },
    }
}

fn long_mode(old: u64, on: bool) -> u64 {
    if on { old | EFER_LONG_MODE } else { old & !EFER_LONG_MODE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_carried_is_what_the_table_lets_vmcs12_leave_in_vmcs02() {
        for item in Item::ALL {
            assert_eq!(CARRIED.contains(&item), item.is_carried_in_vmcs02(), "{}", item.row().name);
        }
        assert_eq!(CARRIED[EFER], Item::Efer);
    }

    #[test]
    fn a_plan_follows_each_control() {
        let mut plan = Inherited::default();
        plan.plan(EntryControls::LOAD_EFER, ExitControls::SAVE_DEBUG_CONTROLS | ExitControls::LOAD_PAT, false);
        assert_eq!((plan.loaded, plan.saved), (0b001, 0b110));
        assert_eq!((plan.loads_pat, plan.saves_pat, plan.host_pat, plan.host_efer), (false, false, true, false));
        plan.plan(EntryControls::LOAD_DEBUG_CONTROLS | EntryControls::LOAD_PAT, ExitControls::SAVE_EFER, false);
        assert_eq!((plan.loaded, plan.saved), (0b110, 0b001));
        assert_eq!((plan.loads_pat, plan.saves_pat, plan.host_pat, plan.host_efer), (true, false, false, false));
        let (loads, saves) = (EntryControls::LOAD_PERF_GLOBAL_CTRL, ExitControls::SAVE_PERF_GLOBAL_CTRL);
        for (entry, exit, keeps) in [
            (loads, saves, false),
            (loads, ExitControls::empty(), true),
            (EntryControls::empty(), saves, false),
            (EntryControls::empty(), ExitControls::empty(), false),
        ] {
            plan.plan(entry, exit, false);
            assert_eq!(plan.keeps_counters, keeps);
        }
        plan.plan(EntryControls::empty(), ExitControls::SAVE_PAT | ExitControls::LOAD_EFER, false);
        assert_eq!((plan.loaded, plan.saved), (0, 0));
        assert_eq!((plan.loads_pat, plan.saves_pat, plan.host_pat, plan.host_efer), (false, true, false, true));
    }

    #[test]
    fn lme_of_a_guest_without_paging_stays_the_guest_s() {
        for old in [0, 0x801, efer::LME, EFER_LONG_MODE, 0xD01] {
            let others = old & !EFER_LONG_MODE;
            assert_eq!(entered(old, true, true), others | EFER_LONG_MODE);
            assert_eq!(entered(old, false, true), others);
            assert_eq!(entered(old, false, false), others | old & efer::LME);
        }
    }
}
