//! The features of the processor that nvmx uses, as words for the banner.

use arrayvec::ArrayString;
use l2_protocol::abi::Strategy;

use crate::{boot::options::FieldsOption, vmx::caps::Capabilities, vmx::controls::SecondaryControls};

/// `fields=zero-copy` on a processor that cannot do it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoShadowing;

impl core::fmt::Display for NoShadowing {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(
            "option fields=zero-copy: this CPU lacks VMCS shadowing (IA32_VMX_PROCBASED_CTLS2 bit 46) or VMWRITE to all \
             fields (IA32_VMX_MISC bit 29); use fields=auto or fields=trapped",
        )
    }
}

/// How L2 reaches the fields of its VMCSs: the wish of the command line on this processor.
pub fn strategy(fields: FieldsOption, vmx: &Capabilities) -> Result<Strategy, NoShadowing> {
    let shadowing = has(vmx, SecondaryControls::VMCS_SHADOWING) && vmx.misc.vmwrite_any_field();
    match fields {
        FieldsOption::Trapped => Ok(Strategy::Trapped),
        FieldsOption::Auto if !shadowing => Ok(Strategy::Trapped),
        FieldsOption::ZeroCopy if !shadowing => Err(NoShadowing),
        FieldsOption::Auto | FieldsOption::ZeroCopy => Ok(Strategy::ZeroCopy),
    }
}

/// The words of the features that this processor has, of those that nvmx makes use of. The longest list has 80 bytes.
pub fn features(vmx: &Capabilities) -> ArrayString<128> {
    let mut words = ArrayString::new();
    for (word, there) in [
        ("ept", has(vmx, SecondaryControls::ENABLE_EPT)),
        ("vpid", has(vmx, SecondaryControls::ENABLE_VPID)),
        ("unrestricted-guest", has(vmx, SecondaryControls::UNRESTRICTED_GUEST)),
        ("vmcs-shadowing", has(vmx, SecondaryControls::VMCS_SHADOWING)),
        ("ept-1g", vmx.ept_vpid.pages_1g()),
        ("ept-ad", vmx.ept_vpid.accessed_dirty()),
    ] {
        let separator = if words.is_empty() { "" } else { " " };
        if there && words.try_push_str(separator).and_then(|()| words.try_push_str(word)).is_err() {
            break;
        }
    }
    words
}

fn has(vmx: &Capabilities, controls: SecondaryControls) -> bool {
    vmx.has_secondary_controls() && vmx.secondary.allows(controls)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor whose capability MSRs all say `value`.
    fn processor(value: u64) -> Capabilities {
        Capabilities::read(|_| value, 39, 48)
    }

    #[test]
    fn every_feature_has_its_word() {
        assert_eq!(&features(&processor(u64::MAX)), "ept vpid unrestricted-guest vmcs-shadowing ept-1g ept-ad");
        assert_eq!(&features(&processor(0)), "");
    }

    #[test]
    fn zero_copy_needs_shadowing_and_auto_takes_the_best() {
        let (with, without) = (processor(u64::MAX), processor(0));
        assert_eq!(strategy(FieldsOption::Auto, &with), Ok(Strategy::ZeroCopy));
        assert_eq!(strategy(FieldsOption::ZeroCopy, &with), Ok(Strategy::ZeroCopy));
        assert_eq!(strategy(FieldsOption::Trapped, &with), Ok(Strategy::Trapped));
        assert_eq!(strategy(FieldsOption::Auto, &without), Ok(Strategy::Trapped));
        assert_eq!(strategy(FieldsOption::ZeroCopy, &without), Err(NoShadowing));
    }
}
