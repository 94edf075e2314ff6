//! The bitmaps, bit by bit: MSRs, shadowed fields.

mod core_support;

use core_support::rich;
use nvmx::addr::Hpa;
use nvmx::mm::phys::VecMem;
use nvmx::mm::{FramePool, PhysMem, Place, Span};
use nvmx::rules::caps::offered;
use nvmx::vmcs::msr_bitmap::{MsrBitmap02, OPEN};
use nvmx::vmcs::msrs::{By, bitmap_word};
use nvmx::vmx::bitmap::{Access, BitmapPage, MsrBitmap, is_shadowed, open_lent, shadow_bitmap, shadow_index};
use nvmx::vmx::field::{Area, Home, Width};
use nvmx::vmx::lent::Loan;
use nvmx::vmx::{Capabilities, Field};
use proptest::prelude::*;

/// The bit at `index` of the page as bytes: how the processor addresses it.
fn byte_bit(page: &BitmapPage, index: usize) -> bool {
    let bytes: Vec<u8> = page.0.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes[index / 8] >> (index % 8) & 1 == 1
}

#[test]
fn msr_bitmap_has_its_four_kilobytes_in_the_sdm_s_order() {
    let quarters = [
        (Access::Read, 0x0000_0000, 0),
        (Access::Read, 0xC000_0000, 1024),
        (Access::Write, 0x0000_0000, 2048),
        (Access::Write, 0xC000_0000, 3072),
    ];
    for (access, first, byte) in quarters {
        for i in 0..0x2000u32 {
            assert_eq!(MsrBitmap::index(first + i, access).map(usize::from), Some(byte * 8 + i as usize));
        }
    }
    for access in [Access::Read, Access::Write] {
        for msr in [0x2000, 0x3000, 0x4000_0000, 0x4B56_4D01, 0xBFFF_FFFF, 0xC000_2000, 0xC001_0000, u32::MAX] {
            assert_eq!(MsrBitmap::index(msr, access), None);
            assert!(MsrBitmap::PASS_ALL.exits(msr, access), "{msr:#x}");
        }
    }
}

#[test]
fn setting_one_msr_sets_one_bit() {
    for access in [Access::Read, Access::Write] {
        for first in [0, 0xC000_0000] {
            for msr in (first..first + 0x2000).step_by(97).chain([first + 0x1FFF]) {
                let mut bitmap = MsrBitmap::PASS_ALL;
                bitmap.set(msr, access, true);
                assert!(bitmap.exits(msr, access));
                assert!(byte_bit(&bitmap.0, usize::from(MsrBitmap::index(msr, access).unwrap())));
                assert_eq!(bitmap.0.0.iter().map(|word| word.count_ones()).sum::<u32>(), 1);
                bitmap.set(msr, access, false);
                assert!(bitmap == MsrBitmap::PASS_ALL);
            }
        }
    }
    let mut bitmap = MsrBitmap::PASS_ALL;
    bitmap.set(0x2000, Access::Read, true);
    assert!(bitmap == MsrBitmap::PASS_ALL, "no bit for an MSR outside of both ranges");
}

#[test]
fn pages_are_what_the_processor_expects() {
    assert_eq!((size_of::<MsrBitmap>(), align_of::<MsrBitmap>()), (4096, 4096));
    assert!(BitmapPage::SET.get(0x7FFF) && !BitmapPage::CLEAR.get(0x7FFF));
    assert!(BitmapPage::CLEAR.get(0x8000), "beyond the page is the side that exits");
    let mut page = BitmapPage::CLEAR;
    page.put(0x8000, true);
    assert!(page == BitmapPage::CLEAR);
}

/// Frames 0, 1 and 2: two bitmaps of L2's, and the one for vmcs02.
struct Merged {
    memory: VecMem,
    ours: BitmapPage,
    bitmap: MsrBitmap02,
}

const THEIRS: [u64; 2] = [0, 0x1000];
const MERGED: u64 = 0x2000;

impl Merged {
    fn new(ours: &BitmapPage) -> Self {
        let memory = VecMem::new(0x3000);
        THEIRS.iter().for_each(|page| memory.write_words(Place::anywhere(Hpa::new(*page)), &BitmapPage::SET.0));
        let mut bitmap = MsrBitmap02::new(FramePool::new(Span::sized(MERGED, 0x1000)).alloc(&memory).unwrap(), &memory);
        bitmap.follow(&memory, Some(Hpa::new(THEIRS[0])));
        Self { memory, ours: ours.clone(), bitmap }
    }

    fn page(&self, at: u64) -> MsrBitmap {
        let bytes = self.memory.bytes(at, 4096);
        let word = |i| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().unwrap());
        MsrBitmap(BitmapPage(std::array::from_fn(word)))
    }

    fn merged(&self) -> MsrBitmap {
        self.page(MERGED)
    }

    fn open(&mut self, bit: u16) {
        self.bitmap.open(&self.memory, bit, |word| self.ours.0[word]);
    }
}

/// Nothing passes that nvmx or L2 wants to see.
fn holds_all(merged: &BitmapPage, ours: &BitmapPage, theirs: &BitmapPage) -> bool {
    (0..512).all(|i| (ours.0[i] | theirs.0[i]) & !merged.0[i] == 0)
}

#[derive(Clone, Debug)]
enum Step {
    /// L2 writes a word of one of its bitmaps, on whatever processor.
    Store(usize, usize, u64),
    /// L3 uses an MSR.
    Use(u16),
    /// The next vmcs12 of the slot, or the same with another bitmap.
    Follow(usize),
}

/// Words near each other, so that they meet, and more of them than can be open.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let word = || prop_oneof![0usize..20, 250usize..262, 508usize..512];
    prop::collection::vec(
        prop_oneof![
            (0usize..2, word(), prop_oneof![Just(0), Just(u64::MAX), any::<u64>()])
                .prop_map(|(p, w, v)| Step::Store(p, w, v)),
            (word(), 0u16..64).prop_map(|(word, bit)| Step::Use(word as u16 * 64 + bit)),
            (word(), 0u16..64).prop_map(|(word, bit)| Step::Use(word as u16 * 64 + bit)),
            (0usize..2).prop_map(Step::Follow),
        ],
        1..100,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]
    /// I3, at each entry and while L3 runs; and what nobody wants to see exits once at most while its word is open.
    #[test]
    fn merged_msr_bitmap_exits_where_either_does(
        ours in prop::collection::vec((0..512usize, any::<u64>()), 0..32), steps in steps(),
    ) {
        let mut page = BitmapPage::CLEAR;
        page.0[256..].fill(u64::MAX);
        ours.iter().for_each(|(i, word)| page.0[*i] = *word);
        let (mut m, mut current) = (Merged::new(&page), 0);
        for step in steps {
            match step {
                Step::Store(page, word, value) => m.memory.write_u64(Hpa::new(THEIRS[page] + 8 * word as u64), value),
                Step::Follow(page) => {
                    current = page;
                    m.bitmap.forget();
                    m.bitmap.follow(&m.memory, Some(Hpa::new(THEIRS[page])));
                }
                Step::Use(bit) => {
                    // The entry before it.
                    m.bitmap.refresh(&m.memory);
                    let theirs = m.page(THEIRS[current]);
                    prop_assert!(holds_all(&m.merged().0, &page, &theirs.0));
                    if m.merged().0.get(bit) && !page.get(bit) && !theirs.0.get(bit) {
                        m.open(bit);
                        prop_assert!(!m.merged().0.get(bit), "the next time it passes");
                        prop_assert!(holds_all(&m.merged().0, &page, &theirs.0));
                    }
                }
            }
        }
    }
}

/// nvmx's part.
fn own() -> MsrBitmap {
    MsrBitmap(BitmapPage(std::array::from_fn(|word| bitmap_word(word, By::Nested))))
}

#[test]
fn a_word_in_use_is_what_nvmx_s_own_msr_bitmap_is_when_l2_intercepts_nothing() {
    let ours = own();
    let mut m = Merged::new(&ours.0);
    m.memory.write_words(Place::anywhere(Hpa::new(THEIRS[0])), &BitmapPage::CLEAR.0);
    for word in 0..512u16 {
        assert_eq!(m.merged().0.0[usize::from(word)], u64::MAX, "closed until it is used");
        m.open(word * 64);
        assert_eq!(m.merged().0.0[usize::from(word)], ours.0.0[usize::from(word)]);
        let open = (0..512).filter(|i| m.merged().0.0[*i] != u64::MAX).count();
        assert!(open <= OPEN, "the oldest gives way");
    }
    m.open(511 * 64);
    assert_eq!(m.merged().0.0[511], ours.0.0[511], "it is open once");
    m.bitmap.follow(&m.memory, Some(Hpa::new(THEIRS[1])));
    assert!(m.merged().0 == BitmapPage::SET, "another bitmap: all is closed");
}

fn built(access: Access, caps: &Capabilities) -> BitmapPage {
    let mut page = BitmapPage::CLEAR;
    shadow_bitmap(&mut page, access, caps);
    page
}

#[test]
fn shadow_bitmaps_open_exactly_the_fields_that_live_in_vmcs02() {
    let caps = offered(&rich());
    for access in [Access::Read, Access::Write] {
        let page = built(access, &caps);
        for encoding in 0..0x8000u32 {
            let open = match Field::decode(encoding) {
                None => false,
                Some((field, _)) => {
                    let lives_there = match access {
                        Access::Read => field.home() != Home::Cache,
                        Access::Write => field.home() == Home::Vmcs02 && field.area() != Area::ExitInfo,
                    };
                    lives_there && caps.has_field(field)
                }
            };
            assert_eq!(!page.get(encoding as u16), open, "{access:?} {encoding:#x}");
        }
    }
}

#[test]
fn no_field_in_nvmx_s_copy_is_open_and_no_host_field_either() {
    let caps = offered(&rich());
    for &field in Field::ALL {
        if field.area() == Area::Host {
            assert_eq!(field.home(), Home::Cache, "{field}: the host area of vmcs02 is nvmx's (I4)");
        }
        for access in [Access::Read, Access::Write] {
            assert!(field.home() != Home::Cache || !is_shadowed(field, access, &caps), "{field}");
        }
        if field.home() == Home::Watched {
            assert!(is_shadowed(field, Access::Read, &caps) && !is_shadowed(field, Access::Write, &caps), "{field}");
        }
    }
}

#[test]
fn what_is_lent_are_the_fields_of_nvmx_that_are_ever_open() {
    let caps = offered(&rich());
    let stack_cr3_fs_gs_and_primary = [0x6C14, 0x6C02, 0x6C06, 0x6C08, 0x4002];
    for (loan, opened) in [(Loan::Nothing, 0), (Loan::Stack, 1), (Loan::Thread, 4), (Loan::All, 5)] {
        let opened = &stack_cr3_fs_gs_and_primary[..opened];
        for access in [Access::Read, Access::Write] {
            let (closed, mut open) = (built(access, &caps), built(access, &caps));
            open_lent(&mut open, loan);
            for encoding in 0..0x8000u16 {
                let differs = closed.get(encoding) != open.get(encoding);
                assert_eq!(differs, opened.contains(&encoding), "{encoding:#x}");
            }
            assert!(opened.iter().all(|encoding| !open.get(*encoding)));
        }
    }
}

#[test]
fn both_halves_of_a_64_bit_field_are_open_together() {
    let caps = offered(&rich());
    for access in [Access::Read, Access::Write] {
        let page = built(access, &caps);
        for &field in Field::ALL.iter().filter(|f| f.width() == Width::W64) {
            let full = field.encoding() as u16;
            assert_eq!(page.get(full), page.get(full + 1), "{field}");
        }
    }
}

#[test]
fn a_field_that_is_not_offered_is_closed() {
    let mut caps = offered(&rich());
    caps.secondary = nvmx::vmx::caps::Allowed::from_msr(0);
    let page = built(Access::Read, &caps);
    assert!(page.get(Field::GUEST_PDPTE0.encoding() as u16), "it needs EPT");
    assert!(!page.get(Field::GUEST_RIP.encoding() as u16));
}

#[test]
fn encodings_beyond_bit_14_have_no_bit() {
    assert_eq!(shadow_index(0x7FFF), Some(0x7FFF));
    for encoding in [0x8000, 1 << 32 | 0x681E, u64::MAX] {
        assert_eq!(shadow_index(encoding), None);
    }
}
