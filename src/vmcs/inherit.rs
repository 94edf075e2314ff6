//! IA32_EFER, IA32_PAT, DR7 and IA32_DEBUGCTL where vmcs12 neither loads nor saves them.
//!
//! On the machine that L2 believes in, such state simply stays in the processor across VM entry and VM exit. Under nvmx the
//! processor always loads and saves it (nvmx's own values must come and go), so it is carried between vmcs01 and vmcs02
//! here, and the field that L2 sees in vmcs12 keeps L2's value.
//!
//! IA32_PAT is kept apart: hypervisors that leave it alone are common, and so L2's field lives in nvmx's copy of vmcs12.
//! Source: SDM vol. 3C, "Loading Guest State", "Saving Guest State", "Loading Host State".

use crate::hw::vmx::Vmx;
use crate::rules::merge::Duties;
use crate::vmcs::tracked::Tracked;
use crate::vmcs::vmcs12::Vmcs12;
use crate::vmx::Field;
use crate::vmx::controls::{EntryControls, ExitControls};
use crate::x86::Cr0;

/// IA32_EFER.LME and LMA, which VM exits set from a control in any case, and VM entries too but for the LME of a guest
/// without paging.
const EFER_LONG_MODE: u64 = EFER_LME | EFER_LMA;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const FIELDS: [Field; 3] = [Field::GUEST_IA32_EFER, Field::GUEST_DR7, Field::GUEST_IA32_DEBUGCTL];
const EFER: usize = 0;
const ALL: u8 = 0b111;

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
    /// IA32_PAT in vmcs02; `None` if L3's MSR area may have loaded another one. L3's own writes exit.
    pat02: Option<u64>,
    /// IA32_PAT in the processor when L3 leaves.
    live_pat: u64,
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
            pat02: None,
            live_pat: 0,
        }
    }
}

impl Inherited {
    /// Notes what vmcs12's controls ask for.
    pub fn plan(&mut self, duties: Duties, entry: EntryControls, exit: ExitControls, unrestricted: bool) {
        let bits =
            |efer, debug| !duties.contains(efer) as u8 | if duties.contains(debug) { 0 } else { ALL & !(1 << EFER) };
        self.loaded = bits(Duties::LOAD_EFER_OF_L2, Duties::LOAD_DEBUG_OF_L2);
        self.saved = bits(Duties::KEEP_EFER, Duties::KEEP_DEBUG);
        self.host_efer = exit.contains(ExitControls::LOAD_EFER);
        self.loads_pat = !duties.contains(Duties::LOAD_PAT_OF_L2);
        self.saves_pat = !duties.contains(Duties::KEEP_PAT);
        self.host_pat = exit.contains(ExitControls::LOAD_PAT);
        self.long_mode_guest = entry.contains(EntryControls::IA32E_MODE_GUEST);
        self.unrestricted = unrestricted;
        self.long_mode_host = exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
    }

    fn items(bits: u8) -> impl Iterator<Item = usize> {
        (0..FIELDS.len()).filter(move |i| bits >> i & 1 == 1)
    }

    /// Before the entry, vmcs01 current: what L2 leaves in the processor.
    #[inline(always)]
    pub fn leave_l2(&mut self, vmx: &mut Vmx) {
        if self.loaded == ALL {
            return;
        }
        for i in Self::items(ALL & !self.loaded) {
            self.live[i] = vmx.read(FIELDS[i]);
        }
    }

    /// Before the entry, vmcs02 current and holding L2's values.
    #[inline(always)]
    pub fn enter_l3(&mut self, vmx: &mut Vmx, vmcs12: &Vmcs12, l2: &Tracked) {
        let pat = if self.loads_pat { vmcs12.get(Field::GUEST_IA32_PAT) } else { l2.pat() };
        if self.pat02 != Some(pat) {
            self.set_pat(vmx, pat);
        }
        if self.loaded & self.saved == ALL {
            return;
        }
        if self.loaded >> EFER & 1 == 0 {
            let paging = !self.unrestricted || vmx.read(Field::GUEST_CR0) & Cr0::PG.bits() != 0;
            self.live[EFER] = entered(self.live[EFER], self.long_mode_guest, paging);
        }
        for i in Self::items(ALL & !(self.loaded & self.saved)) {
            self.original[i] = vmx.read(FIELDS[i]);
            if self.loaded >> i & 1 == 0 {
                vmx.write(FIELDS[i], self.live[i]);
            }
        }
    }

    /// L3's IA32_PAT becomes `pat`; vmcs02 is current.
    pub fn set_pat(&mut self, vmx: &mut Vmx, pat: u64) {
        vmx.write(Field::GUEST_IA32_PAT, pat);
        self.pat02 = Some(pat);
    }

    /// L3's MSR area may load IA32_PAT.
    pub fn forget_pat(&mut self) {
        self.pat02 = None;
    }

    fn pat_of_l3(&mut self, vmx: &mut Vmx) -> u64 {
        *self.pat02.get_or_insert_with(|| vmx.read(Field::GUEST_IA32_PAT))
    }

    /// After an exit of L3 that goes to L2, vmcs02 current.
    #[inline(always)]
    pub fn leave_l3(&mut self, vmx: &mut Vmx, vmcs12: &mut Vmcs12) {
        self.live_pat = self.pat_of_l3(vmx);
        if self.saves_pat {
            vmcs12.set(Field::GUEST_IA32_PAT, self.live_pat);
        }
        if !self.host_efer {
            self.live[EFER] = vmx.read(Field::GUEST_IA32_EFER);
        }
        if self.saved != ALL {
            for i in Self::items(ALL & !self.saved) {
                vmx.write(FIELDS[i], self.original[i]);
            }
        }
    }

    /// After an entry that failed late, vmcs02 current: what L2 finds in the processor. The guest state was loaded only if
    /// the entry came as far as its MSR area.
    pub fn leave_failed_entry(&mut self, vmx: &mut Vmx, l2: &Tracked, guest_state_loaded: bool) {
        if guest_state_loaded {
            self.live_pat = self.pat_of_l3(vmx);
            self.live[EFER] = vmx.read(Field::GUEST_IA32_EFER);
        } else {
            self.live_pat = l2.pat();
            self.live[EFER] = l2.efer();
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

    /// L2's IA32_EFER after the exit, given the host field of vmcs12.
    #[inline(always)]
    pub fn efer_of_l2(&self, host: u64) -> u64 {
        if self.host_efer { host } else { long_mode(self.live[EFER], self.long_mode_host) }
    }

    /// L2's IA32_PAT after the exit, given the host field of vmcs12.
    #[inline(always)]
    pub fn pat_of_l2(&self, host: u64) -> u64 {
        if self.host_pat { host } else { self.live_pat }
    }

    /// vmcs02 gets a new owner.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

/// L3's IA32_EFER by an entry that does not load it: LMA is the control, and so is LME with paging; without, LME stays
/// (SDM, "Loading Guest Control Registers, Debug Registers, and MSRs").
fn entered(efer: u64, long_mode_guest: bool, paging: bool) -> u64 {
    match paging {
        true => long_mode(efer, long_mode_guest),
        false => efer & !EFER_LMA | if long_mode_guest { EFER_LMA } else { 0 },
    }
}

fn long_mode(efer: u64, on: bool) -> u64 {
    if on { efer | EFER_LONG_MODE } else { efer & !EFER_LONG_MODE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lme_of_a_guest_without_paging_stays_l2_s() {
        for efer in [0, 0x801, EFER_LME, EFER_LONG_MODE, 0xD01] {
            let others = efer & !EFER_LONG_MODE;
            assert_eq!(entered(efer, true, true), others | EFER_LONG_MODE);
            assert_eq!(entered(efer, false, true), others);
            assert_eq!(entered(efer, false, false), others | efer & EFER_LME);
        }
    }
}
