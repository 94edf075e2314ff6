//! Task-state segments in memory, of both kinds.
//!
//! Source: SDM vol. 3A, figures "32-Bit Task-State Segment (TSS)" and "16-Bit TSS Format".

use super::state::{CS, DS, ES, FS, GS, SS, State};

/// Bytes of the larger kind up to its I/O map.
pub const SIZE: usize = 104;
/// The link field, in both kinds.
pub const LINK: u32 = 0;
/// The segment registers in the order of both kinds.
const ORDER: [usize; 6] = [ES, CS, SS, DS, FS, GS];

/// The kind of a TSS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// 80286
    Wide16,
    /// 80386
    Wide32,
}

impl Kind {
    /// From the type of a descriptor or of TR.
    pub const fn of(kind: u8) -> Self {
        if kind & 8 == 0 { Self::Wide16 } else { Self::Wide32 }
    }

    /// The smallest limit of a new task's TSS.
    pub const fn least_limit(self) -> u32 {
        match self {
            Self::Wide16 => 0x2B,
            Self::Wide32 => 0x67,
        }
    }

    /// The smallest limit of an old task's TSS.
    pub const fn least_old_limit(self) -> u32 {
        match self {
            Self::Wide16 => 0x29,
            Self::Wide32 => 0x5F,
        }
    }

    /// What the state that is saved takes: the first byte and the last.
    pub const fn saved(self) -> (u32, u32) {
        match self {
            Self::Wide16 => (0x0E, 0x29),
            Self::Wide32 => (0x20, 0x5D),
        }
    }

    /// Bytes that are read of a new task's TSS.
    pub const fn len(self) -> usize {
        self.least_limit() as usize + 1
    }

    /// Hands out what is saved of `state`: offset and bytes. Nothing between the selectors is written.
    pub fn save<E>(self, state: &State, mut write: impl FnMut(u32, &[u8]) -> Result<(), E>) -> Result<(), E> {
        let head = [state.eip, state.eflags].into_iter().chain(state.gprs);
        match self {
            Self::Wide16 => {
                (0x0E..).step_by(2).zip(head).try_for_each(|(at, value)| write(at, &value.to_le_bytes()[..2]))?;
                let selectors = ORDER[..4].iter().map(|n| state.segments[*n].selector);
                (0x22..).step_by(2).zip(selectors).try_for_each(|(at, value)| write(at, &value.to_le_bytes()))
            }
            Self::Wide32 => {
                (0x20..).step_by(4).zip(head).try_for_each(|(at, value)| write(at, &value.to_le_bytes()))?;
                let selectors = ORDER.iter().map(|n| state.segments[*n].selector);
                (0x48..).step_by(4).zip(selectors).try_for_each(|(at, value)| write(at, &value.to_le_bytes()))
            }
        }
    }

    /// What a new task starts with.
    pub fn load(self, bytes: &[u8; SIZE]) -> Loaded {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let mut selectors = [0; 6];
        match self {
            Self::Wide16 => {
                ORDER[..4].iter().enumerate().for_each(|(n, to)| selectors[*to] = half(0x22 + 2 * n));
                Loaded {
                    cr3: None,
                    eip: half(0x0E).into(),
                    eflags: half(0x10).into(),
                    // Undefined by the SDM; ones on every processor that was looked at.
                    gprs: [0, 1, 2, 3, 4, 5, 6, 7].map(|n| 0xFFFF_0000 | u32::from(half(0x12 + 2 * n))),
                    selectors,
                    ldt: half(0x2A),
                    trap: false,
                }
            }
            Self::Wide32 => {
                ORDER.iter().enumerate().for_each(|(n, to)| selectors[*to] = half(0x48 + 4 * n));
                Loaded {
                    cr3: Some(word(0x1C)),
                    eip: word(0x20),
                    eflags: word(0x24),
                    gprs: [0, 1, 2, 3, 4, 5, 6, 7].map(|n| word(0x28 + 4 * n)),
                    selectors,
                    ldt: half(0x60),
                    trap: half(0x64) & 1 != 0,
                }
            }
        }
    }
}

/// The state in a TSS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Loaded {
    /// CR3, if there is one
    pub cr3: Option<u32>,
    /// EIP
    pub eip: u32,
    /// EFLAGS
    pub eflags: u32,
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI
    pub gprs: [u32; 8],
    /// ES, CS, SS, DS, FS, GS
    pub selectors: [u16; 6],
    /// LDT
    pub ldt: u16,
    /// T: debug trap
    pub trap: bool,
}
