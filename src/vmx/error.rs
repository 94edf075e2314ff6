//! How a VMX instruction ends.
//!
//! Source: Intel SDM vol. 3C, "VMX Instruction Reference": "Conventions" and "VM Instruction Error Numbers".

macro_rules! vmx_errors {
    ($( $name:ident = $number:literal, $text:literal; )*) => {
        /// VM-instruction error numbers (SDM vol. 3C, table "VM-Instruction Error Numbers").
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u32)]
        pub enum VmxError { $( #[doc = $text] $name = $number, )* }

        impl VmxError {
            /// All of them.
            pub const ALL: &'static [VmxError] = &[ $( VmxError::$name, )* ];

            /// The name, for records.
            pub const fn name(self) -> &'static str {
                match self { $( VmxError::$name => stringify!($name), )* }
            }

            /// What was wrong.
            pub const fn text(self) -> &'static str {
                match self { $( VmxError::$name => $text, )* }
            }
        }
    };
}

vmx_errors! {
    VmcallInVmxRootOperation = 1, "VMCALL in VMX root operation, where no SMM monitor takes it";
    VmclearInvalidAddress = 2, "VMCLEAR of an address that is no page of this machine";
    VmclearVmxonPointer = 3, "VMCLEAR of the VMXON region";
    VmlaunchNonClearVmcs = 4, "VMLAUNCH of a VMCS that is launched: VMRESUME it, or VMCLEAR it first";
    VmresumeNonLaunchedVmcs = 5, "VMRESUME of a VMCS that is not launched";
    VmresumeAfterVmxoff = 6, "VMRESUME after VMXOFF";
    EntryInvalidControlField = 7, "VM entry with invalid control fields";
    EntryInvalidHostStateField = 8, "VM entry with invalid host state";
    VmptrldInvalidAddress = 9, "VMPTRLD of an address that is no page of this machine";
    VmptrldVmxonPointer = 10, "VMPTRLD of the VMXON region";
    VmptrldIncorrectRevisionId = 11, "VMPTRLD of a region whose first word is not the revision of this machine";
    UnsupportedVmcsComponent = 12, "VMREAD or VMWRITE of a field that this machine does not have";
    VmwriteReadOnlyComponent = 13, "VMWRITE of a read-only field";
    VmxonInVmxRootOperation = 15, "VMXON in VMX root operation";
    EntryInvalidExecutiveVmcsPointer = 16, "VM entry with an invalid executive-VMCS pointer";
    EntryNonLaunchedExecutiveVmcs = 17, "VM entry with an executive VMCS that is not launched";
    EntryExecutiveVmcsPointerNotVmxon = 18, "VM entry with an executive-VMCS pointer that is not the VMXON pointer";
    VmcallNonClearVmcs = 19, "VMCALL to the SMM monitor with a VMCS that is not clear";
    VmcallInvalidExitControls = 20, "VMCALL to the SMM monitor with invalid VM-exit controls";
    VmcallIncorrectMsegRevision = 22, "VMCALL to the SMM monitor with a wrong revision of the MSEG";
    VmxoffUnderDualMonitor = 23, "VMXOFF under the dual-monitor treatment of SMIs and SMM";
    VmcallInvalidSmmMonitorFeatures = 24, "VMCALL to the SMM monitor with features that are not there";
    EntryInvalidExecutionControlInExecutiveVmcs = 25, "VM entry with invalid controls in the executive VMCS";
    EntryEventsBlockedByMovSs = 26, "VM entry while MOV SS blocks events";
    InvalidOperandToInveptInvvpid = 28, "INVEPT or INVVPID with a type or descriptor that this machine does not take";
}

/// What a VMX instruction reports in RFLAGS (SDM vol. 3C, "Conventions": VMsucceed, VMfailInvalid, VMfailValid).
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmxResult {
    /// CF, PF, AF, ZF, SF, OF all clear.
    Succeed,
    /// CF set: there is no current VMCS to hold an error number.
    FailInvalid,
    /// ZF set, and the number goes to the VM-instruction error field of the current VMCS.
    FailValid(VmxError),
}
