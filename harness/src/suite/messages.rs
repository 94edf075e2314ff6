//! What nvmx says when it refuses: parts of the line, kept in one place. Each refusal names what is wrong.

/// A stack of nvmx was nearly too small: no refusal, but no test passes with it.
pub const LITTLE_STACK: &[&str] = &["WARN", "bytes of a stack"];
/// No boot module.
pub const NO_MODULE: &[&str] = &["ERROR", "no boot module"];
/// The first module is no ELF file.
pub const NO_ELF: &[&str] = &["ERROR", "ELF"];
/// The module wants to be where nvmx is.
pub const OVERLAP: &[&str] = &["ERROR", "overlap"];
/// Not enough memory.
pub const LITTLE_MEMORY: &[&str] = &["ERROR", "too little memory"];
/// No VMX.
pub const NO_VMX: &[&str] = &["ERROR", "lacks VMX"];
/// No EPT.
pub const NO_EPT: &[&str] = &["ERROR", "EPT"];
/// No list of processors.
pub const NO_ACPI: &[&str] = &["ERROR", "no ACPI tables", "multiboot2"];
/// L2's triple fault.
pub const TRIPLE_FAULT: &[&str] = &["@L1 epitaph who=L2", "triple fault"];
/// L2 touched nvmx's memory.
pub const TOUCH: &[&str] = &["@L1 epitaph who=L2", "memory"];
/// A machine check without RIPV hit nvmx.
pub const MACHINE_CHECK: &[&str] = &["@L1 epitaph who=nvmx", "#MC, MCG_STATUS 0x4"];
/// A machine check for L2, which does not take any.
pub const NO_MCE: &[&str] = &["@L1 epitaph who=L2", "machine check", "CR4.MCE"];
/// The first module has no multiboot header.
pub const NO_HEADER: &[&str] = &["ERROR", "multiboot"];
/// A flat image whose entry point is not in it.
pub const ASTRAY: &[&str] = &["ERROR", "multiboot header", "entry point"];
/// A value that its option does not accept.
pub const BAD_VALUE: &[&str] = &["ERROR", "sideways", "fields"];
/// KVM without nesting, told by the VMM.
pub const NO_NESTING: &[&str] = &["[vmm ERROR]", "nesting off", "nested=1"];
/// KVM without EPT, told by the VMM.
pub const KVM_NO_EPT: &[&str] = &["[vmm ERROR]", "without EPT"];
