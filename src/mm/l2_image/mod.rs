//! L2's image: from the first boot module to a loaded guest hypervisor that waits for its first instruction.

use crate::addr::Gpa;

/// The protocol by which L2 is started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// Multiboot 1: EAX = 0x2BADB002
    Multiboot1,
    /// Multiboot 2: EAX = 0x36D76289
    Multiboot2,
}

impl Protocol {
    /// What EAX holds at L2's first instruction.
    pub const fn magic(self) -> u32 {
        match self {
            Self::Multiboot1 => 0x2BAD_B002,
            Self::Multiboot2 => 0x36D7_6289,
        }
    }
}

/// How L2's first processor starts: 32-bit protected mode, paging off, flat 4 GiB code and data segments, A20 on,
/// interrupts off; ESP, GDTR and IDTR undefined.
///
/// Source: Multiboot specification and Multiboot2 specification, "Machine state".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Start {
    /// The protocol that L2's header asks for.
    pub protocol: Protocol,
    /// EIP
    pub entry: Gpa,
    /// EAX
    pub eax: u32,
    /// EBX: the boot information
    pub ebx: Gpa,
}
