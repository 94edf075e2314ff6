//! IA32_EFER, IA32_PAT, DR7 and IA32_DEBUGCTL where vmcs12 neither loads nor saves them.
//!
//! On the machine that L2 believes in, such state simply stays in the processor across VM entry and VM exit. Under nvmx the
//! processor always loads and saves it (nvmx's own values must come and go), so it is carried between vmcs01 and vmcs02
//! here, and the field that L2 sees in vmcs12 keeps L2's value.
//! Source: SDM vol. 3C, "Loading Guest State", "Saving Guest State", "Loading Host State".

use super::merge::Duties;
use crate::hw::vmx::Vmx;
use crate::vmx::Field;
use crate::vmx::controls::{EntryControls, ExitControls};

/// IA32_EFER.LME and LMA, which VM entry and VM exit set from a control in any case.
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

const FIELDS: [Field; 4] =
    [Field::GUEST_IA32_EFER, Field::GUEST_IA32_PAT, Field::GUEST_DR7, Field::GUEST_IA32_DEBUGCTL];
const EFER: usize = 0;
const PAT: usize = 1;

/// What vmcs12 asks for, and the values on their way.
#[derive(Clone, Copy, Default)]
pub struct Inherited {
    /// Bit i: the VM entry loads item i from vmcs12.
    loaded: u8,
    /// Bit i: the VM exit saves item i to vmcs12.
    saved: u8,
    /// Bit i: the VM exit loads item i from vmcs12's host area, or with a constant.
    host: u8,
    long_mode_guest: bool,
    long_mode_host: bool,
    /// The value in the processor.
    live: [u64; 4],
    /// The value of vmcs12's field.
    original: [u64; 4],
}

const ALL: u8 = 0b1111;

impl Inherited {
    /// Notes what vmcs12's controls ask for.
    pub fn plan(&mut self, duties: Duties, entry: EntryControls, exit: ExitControls) {
        let bits = |efer, pat, debug| efer as u8 | (pat as u8) << 1 | if debug { 0b1100 } else { 0 };
        let from = |efer, pat, debug| bits(!duties.contains(efer), !duties.contains(pat), !duties.contains(debug));
        self.loaded = from(Duties::LOAD_EFER_OF_L2, Duties::LOAD_PAT_OF_L2, Duties::LOAD_DEBUG_OF_L2);
        self.saved = from(Duties::KEEP_EFER, Duties::KEEP_PAT, Duties::KEEP_DEBUG);
        self.host = bits(exit.contains(ExitControls::LOAD_EFER), exit.contains(ExitControls::LOAD_PAT), true);
        self.long_mode_guest = entry.contains(EntryControls::IA32E_MODE_GUEST);
        self.long_mode_host = exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
    }

    fn items(bits: u8) -> impl Iterator<Item = usize> {
        (0..4).filter(move |i| bits >> i & 1 == 1)
    }

    /// Before the entry, vmcs01 current: what L3 will find in the processor.
    #[inline(always)]
    pub fn leave_l2(&mut self, vmx: &mut Vmx) {
        if self.loaded == ALL {
            return;
        }
        for i in Self::items(ALL & !self.loaded) {
            self.live[i] = vmx.read(FIELDS[i]);
        }
        self.live[EFER] = long_mode(self.live[EFER], self.long_mode_guest);
    }

    /// Before the entry, vmcs02 current and holding L2's values.
    #[inline(always)]
    pub fn enter_l3(&mut self, vmx: &mut Vmx) {
        if self.loaded & self.saved == ALL {
            return;
        }
        for i in Self::items(ALL & !(self.loaded & self.saved)) {
            self.original[i] = vmx.read(FIELDS[i]);
            if self.loaded >> i & 1 == 0 {
                vmx.write(FIELDS[i], self.live[i]);
            }
        }
    }

    /// After an exit of L3 that goes to L2, vmcs02 current.
    #[inline(always)]
    pub fn leave_l3(&mut self, vmx: &mut Vmx) {
        for i in Self::items(ALL & !self.host) {
            self.live[i] = vmx.read(FIELDS[i]);
        }
        for i in Self::items(ALL & !self.saved) {
            vmx.write(FIELDS[i], self.original[i]);
        }
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
        if self.host >> EFER & 1 == 1 { host } else { long_mode(self.live[EFER], self.long_mode_host) }
    }

    /// L2's IA32_PAT after the exit, given the host field of vmcs12.
    #[inline(always)]
    pub fn pat_of_l2(&self, host: u64) -> u64 {
        if self.host >> PAT & 1 == 1 { host } else { self.live[PAT] }
    }
}

fn long_mode(efer: u64, on: bool) -> u64 {
    if on { efer | EFER_LONG_MODE } else { efer & !EFER_LONG_MODE }
}
