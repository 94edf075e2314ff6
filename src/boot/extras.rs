//! What the loader says and nvmx has no use for: kept to be handed on to L2, by either version of the protocol.
//!
//! Not handed on is what describes nvmx's own image (symbols, load base, EFI image handles) or would show its memory as free
//! (the EFI memory map; L2 gets the map of the protocol).
//!
//! Source: Multiboot Specification 0.6.96 and Multiboot2 Specification 2.0, "Boot information format".

use arrayvec::ArrayVec;

use crate::{
    addr::Hpa,
    boot::multiboot::{layout, tag},
    mm::PhysMem,
};

/// Bytes of the APM table, the same in both versions.
pub const APM_SIZE: usize = 20;
/// Bytes of the two structures of VBE: of the controller and of the mode.
pub const VBE_BLOCKS: usize = 512 + 256;
/// Bytes of the fields of VBE beside them: mode, segment, offset and length of the interface.
pub const VBE_FIELDS: usize = 8;
/// Bytes of a framebuffer's address, pitch, width, height, bits per pixel, type.
pub const FRAMEBUFFER_FIELDS: usize = 22;
/// Most bytes of a framebuffer's colours: a palette of 256 descriptors of three bytes.
pub const MAX_COLOURS: usize = 3 * 256;
/// Most bytes of the list of drives.
pub const MAX_DRIVES: usize = 512;
/// Most bytes of the tags that are handed on as they are.
pub const MAX_TAGS: usize = 2048;

/// A framebuffer of indexed colours.
const INDEXED: u8 = 0;
/// A framebuffer of direct colours.
const DIRECT: u8 = 1;
/// The place of the type among the fields.
const TYPE_AT: usize = 21;

/// What VBE says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vbe {
    /// Mode, segment, offset, length: 16 bits each.
    pub fields: [u8; VBE_FIELDS],
    /// The structures of the controller and of the mode.
    pub blocks: [u8; VBE_BLOCKS],
}

/// A framebuffer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Framebuffer {
    /// Address (64 bits), pitch, width, height (32 bits each), bits per pixel, type (8 bits each).
    pub fields: [u8; FRAMEBUFFER_FIELDS],
    /// By type: the descriptors of a palette, or position and size of red, green and blue; else empty.
    pub colours: ArrayVec<u8, MAX_COLOURS>,
}

impl Framebuffer {
    /// Whether `colours` is a palette.
    pub const fn is_indexed(&self) -> bool {
        self.fields[TYPE_AT] == INDEXED
    }
}

/// What is handed on. Each is absent where the loader did not give it, or more of it than there is room.
#[derive(Clone, Default, Debug)]
pub struct Extras {
    /// The BIOS drive, and partition, sub-partition and sub-sub-partition, all ones for none.
    pub boot_device: Option<[u32; 4]>,
    /// Structures of all drives, one after another (multiboot 1).
    pub drives: ArrayVec<u8, MAX_DRIVES>,
    /// Address of the BIOS's configuration table (multiboot 1).
    pub config_table: Option<u32>,
    /// The APM table.
    pub apm: Option<[u8; APM_SIZE]>,
    /// What VBE says.
    pub vbe: Option<Vbe>,
    /// The framebuffer.
    pub framebuffer: Option<Framebuffer>,
    /// Whole tags, each padded to a multiple of eight (multiboot 2): EFI system tables, SMBIOS, network.
    pub tags: ArrayVec<u8, MAX_TAGS>,
}

impl Extras {
    /// Reads what multiboot 1 information at `at` has.
    pub fn multiboot1(at: Hpa, memory: &impl PhysMem) -> Self {
        let place = |offset: u64| Hpa::new(at.get().wrapping_add(offset));
        let field = |offset: u64| memory.read_u32(place(offset));
        let pointer = |offset: u64| Hpa::new(field(offset).into());
        let flags = field(layout::FLAGS);
        let has = |flag: u32| flags & flag != 0;
        let mut extras = Self::default();
        if has(layout::HAS_BOOT_DEVICE) {
            // The bytes from the highest on; all ones for none.
            extras.boot_device = Some(field(layout::BOOT_DEVICE).to_be_bytes().map(|byte| match byte {
                u8::MAX => u32::MAX,
                number => number.into(),
            }));
        }
        if has(layout::HAS_DRIVES) {
            extras.drives = read(memory, pointer(layout::DRIVES), field(layout::DRIVES_LENGTH).into());
        }
        extras.config_table = has(layout::HAS_CONFIG_TABLE).then(|| field(layout::CONFIG_TABLE));
        extras.apm = has(layout::HAS_APM).then(|| read_array(memory, pointer(layout::APM)));
        if has(layout::HAS_VBE) {
            let mut blocks = [0; VBE_BLOCKS];
            let (control, mode) = blocks.split_at_mut(512);
            memory.read_bytes(pointer(layout::VBE_CONTROL), control);
            memory.read_bytes(pointer(layout::VBE_MODE_INFO), mode);
            extras.vbe = Some(Vbe { fields: read_array(memory, place(layout::VBE_FIELDS)), blocks });
        }
        if has(layout::HAS_FRAMEBUFFER) {
            let fields: [u8; FRAMEBUFFER_FIELDS] = read_array(memory, place(layout::FRAMEBUFFER));
            let colours = match fields[TYPE_AT] {
                INDEXED => {
                    let [low, high] = read_array(memory, place(layout::PALETTE_LENGTH));
                    let bytes = 3 * u64::from(u16::from_le_bytes([low, high]));
                    read(memory, pointer(layout::PALETTE), bytes)
                }
                DIRECT => read(memory, place(layout::COLOURS), 6),
                _ => ArrayVec::new(),
            };
            extras.framebuffer = Some(Framebuffer { fields, colours });
        }
        extras
    }

    /// Takes the tag of multiboot 2 information at `at`, `size` bytes with its head, if it is one to hand on.
    pub fn take_tag(&mut self, kind: u32, at: Hpa, size: u64, memory: &impl PhysMem) {
        let place = |offset: u64| Hpa::new(at.get().wrapping_add(offset));
        match kind {
            tag::BOOT_DEVICE if size >= 20 => {
                let word = |offset| memory.read_u32(place(offset));
                self.boot_device = Some([word(8), word(12), word(16), u32::MAX]);
            }
            tag::VBE if size >= (8 + VBE_FIELDS + VBE_BLOCKS) as u64 => {
                self.vbe = Some(Vbe {
                    fields: read_array(memory, place(8)),
                    blocks: read_array(memory, place(8 + VBE_FIELDS as u64)),
                });
            }
            // Two reserved bytes, then the colours: a palette behind its length in 16 bits.
            tag::FRAMEBUFFER if size >= 32 => {
                let fields: [u8; FRAMEBUFFER_FIELDS] = read_array(memory, place(8));
                let rest = size - 32;
                let colours = match fields[TYPE_AT] {
                    INDEXED if rest >= 2 => {
                        let [low, high] = read_array(memory, place(32));
                        read(memory, place(34), (3 * u64::from(u16::from_le_bytes([low, high]))).min(rest - 2))
                    }
                    DIRECT if rest >= 6 => read(memory, place(32), 6),
                    _ => ArrayVec::new(),
                };
                self.framebuffer = Some(Framebuffer { fields, colours });
            }
            tag::APM if size >= (8 + APM_SIZE) as u64 => self.apm = Some(read_array(memory, place(8))),
            tag::EFI32 | tag::EFI64 | tag::SMBIOS | tag::NETWORK => {
                let whole: ArrayVec<u8, MAX_TAGS> = read(memory, at, size);
                let padding = whole.len().next_multiple_of(8) - whole.len();
                if whole.len() + padding <= self.tags.remaining_capacity() {
                    self.tags.extend(whole.into_iter().chain([0; 8].into_iter().take(padding)));
                }
            }
            _ => {}
        }
    }

    /// Whether L2 can be told of a screen.
    pub const fn has_screen(&self) -> bool {
        self.vbe.is_some() || self.framebuffer.is_some()
    }

    /// Whether a tag of this kind is handed on.
    pub fn has_tag(&self, kind: u32) -> bool {
        match kind {
            tag::BOOT_DEVICE => self.boot_device.is_some(),
            tag::VBE => self.vbe.is_some(),
            tag::FRAMEBUFFER => self.framebuffer.is_some(),
            tag::APM => self.apm.is_some(),
            other => self.tags().any(|tag| tag.starts_with(&other.to_le_bytes())),
        }
    }

    /// The whole tags of `tags`.
    fn tags(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.tags.as_slice();
        core::iter::from_fn(move || {
            let size = u32::from_le_bytes(rest.get(4..8)?.try_into().ok()?);
            let (tag, behind) = rest.split_at_checked((size as usize).next_multiple_of(8))?;
            rest = behind;
            Some(tag)
        })
    }
}

fn read_array<const N: usize>(memory: &impl PhysMem, at: Hpa) -> [u8; N] {
    let mut bytes = [0; N];
    memory.read_bytes(at, &mut bytes);
    bytes
}

/// `len` bytes at `at`; none at all when there are more than `N`.
fn read<const N: usize>(memory: &impl PhysMem, at: Hpa, len: u64) -> ArrayVec<u8, N> {
    let bytes: [u8; N] = read_array(memory, at);
    let len = usize::try_from(len).ok().filter(|len| *len <= N).unwrap_or(0);
    bytes.into_iter().take(len).collect()
}
