//! The bitmaps, bit by bit: MSRs, shadowed fields.

mod core_support;

use core_support::rich;
use nvmx::addr::{Gpa, Hpa};
use nvmx::mm::phys::VecMem;
use nvmx::mm::{GuestMemory, PhysMem, Span};
use nvmx::rules::caps::offered;
use nvmx::rules::merge::{MsrIntercepts, msr_bitmaps};
use nvmx::vmcs::msrs::{By, bitmap_word};
use nvmx::vmx::bitmap::{Access, BitmapPage, MsrBitmap, is_shadowed, shadow_bitmap, shadow_index};
use nvmx::vmx::field::{Area, Home, Width};
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

/// Frames 1 and 2: L2's bitmap and the one for vmcs02, which nvmx owns.
fn merged(ours: &BitmapPage, theirs: &BitmapPage, at: Gpa) -> MsrBitmap {
    let memory = VecMem::new(0x4000);
    for (page, start) in [(theirs, 0x1000), (&BitmapPage::SET, 0x2000)] {
        for (i, word) in page.0.iter().enumerate() {
            memory.write_u64(Hpa::new(start + 8 * i as u64), *word);
        }
    }
    let guest = GuestMemory::new(&memory, Span::new(0x2000, 0x3000), 36);
    msr_bitmaps(&&memory, &MsrIntercepts::new(|word| ours.0[word]), &guest, at, Hpa::new(0x2000));
    MsrBitmap(BitmapPage(std::array::from_fn(|i| memory.read_u64(Hpa::new(0x2000 + 8 * i as u64)))))
}

proptest! {
    #[test]
    fn merged_msr_bitmap_exits_where_either_does(
        ours in prop::collection::vec((0..512usize, any::<u64>()), 0..32), b in prop::collection::vec(any::<u64>(), 512),
    ) {
        let page = |words: Vec<u64>| MsrBitmap(BitmapPage(words.try_into().unwrap()));
        let (mut a, b) = (MsrBitmap::PASS_ALL, page(b));
        // As nvmx's is: most reads pass, most writes exit.
        a.0.0[256..].fill(u64::MAX);
        ours.iter().for_each(|(i, word)| a.0.0[*i] = *word);
        let merged = merged(&a.0, &b.0, Gpa::new(0x1000));
        for msr in (0..0x2000).chain(0xC000_0000..0xC000_2000) {
            for access in [Access::Read, Access::Write] {
                prop_assert_eq!(merged.exits(msr, access), a.exits(msr, access) || b.exits(msr, access));
            }
        }
    }
}

/// nvmx's part.
fn own() -> MsrBitmap {
    MsrBitmap(BitmapPage(std::array::from_fn(|word| bitmap_word(word, By::L3))))
}

#[test]
fn nvmx_s_own_msr_bitmap_is_what_is_left_when_l2_intercepts_nothing() {
    let ours = own();
    assert!(merged(&ours.0, &BitmapPage::CLEAR, Gpa::new(0x1000)) == ours);
    assert!(merged(&ours.0, &BitmapPage::SET, Gpa::new(0x1000)).0 == BitmapPage::SET);
}

#[test]
fn an_msr_bitmap_outside_of_l2_s_memory_makes_everything_exit() {
    for at in [0x2000, 1 << 36] {
        let merged = merged(&own().0, &BitmapPage::CLEAR, Gpa::new(at));
        assert!(merged.0 == BitmapPage::SET, "{at:#x}");
    }
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
