//! Where the instructions go that L3's boot takes more under nvmx than with KVM alone, on a KVM below both.

use super::linux::named;
use crate::text::number;
use crate::transcript::Transcript;
use l2_protocol::OwnedRecord;

/// The stage that is looked at.
const STAGE: &str = "l3_boot";

/// What is known of the difference.
struct Added {
    /// All of it
    all: i64,
    /// From an exit to nvmx until the next entry, as the TSC counts: with what KVM does for nvmx's own VMX instructions
    inside: i64,
    /// Exits to nvmx
    hardware: u64,
    /// VMX instructions of nvmx that exit to KVM
    own: u64,
    /// Exits of L3 to L2, alone and under nvmx, and those to the KVM below
    exits: Option<[[u64; 2]; 2]>,
}

/// VMMs count from the line of their guest before: the whole stage if that printed none meanwhile, so that they count as many exits of L3 as
/// nvmx reflected.
pub fn is_whole(under: &OwnedRecord) -> bool {
    figure(under, "l0_exits").zip(figure(under, "reflected")).is_some_and(|(l2, nvmx)| l2.abs_diff(nvmx) <= nvmx / 10)
}

impl Added {
    fn of(alone: &Transcript, under: &Transcript) -> Option<Self> {
        let records = [named(alone, STAGE).next_back()?, named(under, STAGE).next_back()?];
        let both = |key: &str| -> Option<[u64; 2]> { Some([figure(records[0], key)?, figure(records[1], key)?]) };
        let of_nvmx = |key: &str| figure(records[1], key);
        let (ticks, below) = (both("ticks")?, both("outer_exits")?);
        Some(Added {
            all: ticks[1] as i64 - ticks[0] as i64,
            inside: of_nvmx("l1_ticks")? as i64,
            hardware: of_nvmx("hw_exits")?,
            own: ["l1_vmptrld", "l1_vmclear", "l1_invept", "l1_invvpid"].into_iter().filter_map(of_nvmx).sum(),
            exits: is_whole(records[1]).then(|| Some([both("l0_exits")?, below])).flatten(),
        })
    }
}

fn figure(record: &OwnedRecord, key: &str) -> Option<u64> {
    record.number(key).ok()
}

/// The lines that tell it; none where no KVM is below, or one of the boots did not come so far.
pub fn lines(alone: &Transcript, under: &Transcript) -> Vec<String> {
    let Some(added) = Added::of(alone, under) else { return Vec::new() };
    let n = |n: i64| number(Some(n as f64));
    let between = added.all - added.inside;
    let each = |sum: i64| n(sum.checked_div(added.hardware as i64).unwrap_or(0));
    let mut lines = vec![
        String::new(),
        format!("L3's boot takes {} instructions more under nvmx. Where they go:", n(added.all)),
        format!(
            "  {} inside nvmx, {} for each of {} exits, with what KVM does for {} of its VMX instructions",
            n(added.inside),
            each(added.inside),
            n(added.hardware as i64),
            n(added.own as i64)
        ),
        format!("  {} in the KVM below, for these exits, as many entries, and L2's VMREADs and VMWRITEs", n(between)),
    ];
    lines.extend(added.exits.map(|[[l2_alone, l2], [below_alone, below]]| {
        let [l2, l2_alone, below, below_alone] = [l2, l2_alone, below, below_alone].map(|count| n(count as i64));
        format!("  L3 exits to L2 {l2} times instead of {l2_alone}; the KVM below takes {below} exits instead of {below_alone}")
    }));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::transcript;

    #[test]
    fn the_difference_is_split_between_nvmx_and_the_kvm_below() {
        let alone = transcript(&["@L3 event name=l3_boot ticks=1000000 l0_exits=50 outer_exits=200"]);
        let under = "@L3 event name=l3_boot ticks=1600000 l0_exits=52 outer_exits=900 hw_exits=100 reflected=51 l1_ticks=250000 \
                     l1_vmptrld=104 l1_invept=2";
        let text = lines(&alone, &transcript(&[under])).join("\n");
        assert!(text.contains("600,000 instructions more"), "{text}");
        assert!(text.contains("250,000 inside nvmx, 2,500 for each of 100 exits"), "{text}");
        assert!(text.contains("for 106 of its VMX") && text.contains("350,000 in the KVM below"), "{text}");
        assert!(text.contains("52 times instead of 50") && text.contains("900 exits instead of 200"), "{text}");
        // Counted from a line in the midst of it the exits are not the stage's.
        let part = lines(&alone, &transcript(&[&under.replace("l0_exits=52", "l0_exits=12")])).join("\n");
        assert!(part.contains("600,000 instructions more") && !part.contains("times instead of"), "{part}");
        // Without a KVM below there is nothing to split.
        let bare = transcript(&["@L3 event name=l3_boot ticks=1000000 l0_exits=50"]);
        assert!(lines(&bare, &transcript(&[under])).is_empty());
    }
}
