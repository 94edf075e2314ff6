//! The checks of a VM entry: one function per rule of the SDM, in the order controls, host state, guest state.
//!
//! Each rule has a [`CheckId`] with its text, so a failed entry can say which rule failed. Controls and host state are
//! nvmx's to check, because vmcs02 runs with merged values; guest state runs in vmcs02 as L2 wrote it and the processor
//! checks it, so the rules here explain its verdict and catch what hardware would accept although nvmx does not offer it.
//!
//! Source: Intel SDM vol. 3C (December 2024), chapter "VM Entries": "Checks on VMX Controls and Host-State Area" and
//! "Checking and Loading Guest State".

mod all;
mod controls;
mod guest;
mod host;
mod id;
mod msr_load;
mod segments;
mod state;
mod view;
mod virtual_apic;

pub use all::all_broken;
pub use controls::{check_cached_controls, check_controls, check_live_controls, eptp_is_valid};
pub use guest::{GuestContext, ReadsGuest, check_guest, check_guest_beyond_hardware};
pub use host::{check_host, host_field_holds};
pub use id::CheckId;
pub use msr_load::{REFUSED, msr_load_failure};
pub use virtual_apic::check_virtual_tpr;

use crate::vmx::VmxError;

/// A rule of the first two groups that did not hold: VMLAUNCH or VMRESUME fails with `error`.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// Which rule.
    pub check: CheckId,
    /// What the instruction reports.
    pub error: VmxError,
}

/// A rule on the guest state that did not hold: the entry ends in an exit with reason 33.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestFailure {
    /// Which rule.
    pub check: CheckId,
    /// Exit qualification.
    pub qualification: u64,
}

/// Proof that the rules on control fields in nvmx's copy held for the values they had: what the merge asks for. Only
/// [`check_controls`] and [`check_cached_controls`] make one; whoever keeps it drops it when such a field is written.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ControlsChecked(());

/// Runs rules in order and leaves with the first that does not hold, unless whoever has the fields wants to hear of all.
macro_rules! first_failure {
    ($view:expr; $( $id:ident => $rule:expr; )*) => {
        'rules: {
            $(
                let id = $crate::rules::checks::CheckId::$id;
                if !$rule($view) && $view.fields.ends_at(id as u16) {
                    break 'rules Some(id);
                }
            )*
            None
        }
    };
}
use first_failure;
