//! `benches/stack.json`: what L3's boot costs on the usual stack, KVM, nvmx, Linux with KVM, Linux, as it was booked, and where each row is
//! from.
//!
//! These boots take minutes and are not the same to the instruction with another image: the timers of four levels fire where they do. So
//! a figure may be off by a share, and what is off by more, up or down, is a difference.

use super::added;
use super::linux::named;
use super::provenance::Provenance;
use crate::text::number;
use crate::transcript::Transcript;
use anyhow::{Context, Result, ensure};
use l2_protocol::OwnedRecord;
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::path::Path;

/// The file's schema.
const SCHEMA: &str = "nvmx-stack/1";
/// The stage.
const STAGE: &str = "l3_boot";

/// The file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Book {
    /// `nvmx-stack/1`
    schema: String,
    /// By what share of the booked value a figure may be off
    within: f64,
    /// The rows
    rows: Vec<Row>,
}

/// One stack.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// "vmm=own, 1 CPU"
    pub name: String,
    /// What was counted
    pub figures: Figures,
    /// Where and when
    pub provenance: Provenance,
}

/// What was counted while L3 booted.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// Instructions with one KVM less
    pub alone: u64,
    /// Instructions under nvmx
    pub under: u64,
    /// Instructions with KVM in nvmx's place, where that was booted
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_place: Option<u64>,
    /// From an exit to nvmx until the next entry, with what KVM does for nvmx's own VMX instructions
    pub inside: u64,
    /// Exits to nvmx
    pub hw_exits: u64,
    /// Exits of the KVM below with one KVM less, where they were counted for the whole boot
    #[serde(skip_serializing_if = "Option::is_none")]
    pub below_alone: Option<u64>,
    /// Exits of the KVM below under nvmx
    #[serde(skip_serializing_if = "Option::is_none")]
    pub below: Option<u64>,
}

impl Figures {
    /// From the boots; `None` if one of them did not come so far.
    pub fn of(alone: &Transcript, under: &Transcript, in_place: Option<&Transcript>) -> Option<Self> {
        let record = |said| named(said, STAGE).next_back();
        let figure = |record: &OwnedRecord, key: &str| record.number(key).ok();
        let (one, two) = (record(alone)?, record(under)?);
        let in_place = match in_place {
            Some(said) => Some(figure(record(said)?, "ticks")?),
            None => None,
        };
        let below = |record| if added::is_whole(two) { figure(record, "outer_exits") } else { None };
        Some(Figures {
            alone: figure(one, "ticks")?,
            under: figure(two, "ticks")?,
            in_place,
            inside: figure(two, "l1_ticks")?,
            hw_exits: figure(two, "hw_exits")?,
            below_alone: below(one),
            below: below(two),
        })
    }

    /// What nvmx adds.
    fn added(&self) -> f64 {
        self.under as f64 - self.alone as f64
    }

    /// What KVM in its place adds.
    fn kvm_adds(&self) -> Option<f64> {
        self.in_place.map(|kvm| kvm as f64 - self.alone as f64)
    }

    /// What nvmx answers for. What the boot takes without it is KVM's and Linux'.
    fn of_nvmx(&self) -> [(&'static str, Option<f64>); 4] {
        [
            ("instructions that nvmx adds", Some(self.added())),
            ("inside nvmx", Some(self.inside as f64)),
            ("exits to nvmx", Some(self.hw_exits as f64)),
            ("exits of the KVM below", self.below.map(|n| n as f64)),
        ]
    }

    /// For people.
    pub fn text(&self) -> String {
        let n = |value: f64| number(Some(value));
        let mut text = format!("{} of one KVM less", n(self.alone as f64));
        for (name, value) in self.of_nvmx().into_iter().filter(|(_, value)| value.is_some()) {
            let _ = write!(text, "; {name} {}", number(value));
        }
        if let Some(kvm) = self.kvm_adds() {
            let _ = write!(text, "; of what KVM adds in its place {:.1} %", self.added() / kvm * 100.0);
        }
        text
    }
}

impl Book {
    /// Reads the file.
    ///
    /// # Errors
    /// If it cannot be read, or is no such file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let book: Book = serde_json::from_str(text)?;
        ensure!(book.schema == SCHEMA, "unknown schema {}", book.schema);
        ensure!(book.within > 0.0 && book.within < 1.0, "`within` is a share");
        Ok(book)
    }

    /// The row of this name.
    pub fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }

    /// A row in the place of the one before it.
    pub fn book(&mut self, row: Row) {
        match self.rows.iter_mut().find(|booked| booked.name == row.name) {
            Some(booked) => *booked = row,
            None => self.rows.push(row),
        }
    }

    /// What of these figures is off by more than it may be.
    ///
    /// # Errors
    /// A line for each, or that there is no such row.
    pub fn judge(&self, name: &str, now: &Figures) -> Result<(), String> {
        let row = self.row(name).ok_or_else(|| format!("benches/stack.json has no row {name}"))?;
        let off = |pair: &(Option<f64>, Option<f64>)| match pair {
            (Some(before), Some(now)) => (now - before).abs() > before.abs() * self.within,
            (before, now) => before != now,
        };
        let pairs = row.figures.of_nvmx().into_iter().zip(now.of_nvmx());
        let lines: Vec<String> = pairs
            .map(|((figure, before), (_, now))| (figure, (before, now)))
            .filter(|(_, pair)| off(pair))
            .map(|(figure, (before, now))| {
                let share = before.zip(now).map(|(before, now)| (now - before) / before * 100.0);
                let share = share.map_or(String::new(), |share| format!(" ({share:+.1} %)"));
                format!("  {figure}: {} booked, {} now{share}", number(before), number(now))
            })
            .collect();
        if lines.is_empty() {
            return Ok(());
        }
        let of = row.provenance.machine.as_ref().map_or("?", |place| place.l0.as_str());
        let more = self.within * 100.0;
        Err(format!(
            "{name}: more than {more} % off the row of {} ({of}); if that is meant, ./nvmx bench --stack --bless books it:\n{}",
            row.provenance.date,
            lines.join("\n")
        ))
    }

    /// The file's text.
    ///
    /// # Errors
    /// If a figure is no number.
    pub fn text(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::super::provenance::tests::place;
    use super::*;
    use crate::report::tests::transcript;

    fn figures() -> Figures {
        let alone = transcript(&["@L3 event name=l3_boot ticks=1000000 outer_exits=200"]);
        let under = transcript(&[
            "@L3 event name=l3_boot ticks=1200000 outer_exits=900 hw_exits=100 reflected=50 l1_ticks=50000 l0_exits=50",
        ]);
        let kvm = transcript(&["@L3 event name=l3_boot ticks=3000000"]);
        Figures::of(&alone, &under, Some(&kvm)).unwrap()
    }

    fn book() -> Book {
        let provenance = Provenance {
            command: "x".into(),
            revision: None,
            changed: None,
            date: "2026-11-29T00:00:00Z".into(),
            machine: Some(place()),
        };
        let row = Row { name: "one".into(), figures: figures(), provenance };
        Book { schema: SCHEMA.into(), within: 0.05, rows: vec![row] }
    }

    #[test]
    fn figures_are_those_of_the_boots() {
        let now = figures();
        assert_eq!(
            (now.alone, now.under, now.in_place, now.below_alone, now.below),
            (1_000_000, 1_200_000, Some(3_000_000), Some(200), Some(900))
        );
        assert!(now.text().contains("adds 200,000") && now.text().contains("in its place 10.0 %"), "{}", now.text());
        let short = transcript(&["@L3 event name=l3_boot ticks=1 outer_exits=2"]);
        assert_eq!(Figures::of(&short, &short, None), None, "no nvmx below");
    }

    #[test]
    fn what_is_off_by_more_than_its_share_differs_up_and_down() {
        let book = book();
        let judge = |change: fn(&mut Figures)| {
            let mut now = figures();
            change(&mut now);
            book.judge("one", &now)
        };
        assert_eq!(judge(|_| ()), Ok(()));
        assert_eq!(judge(|f| (f.under, f.hw_exits, f.below) = (1_210_000, 105, Some(855))), Ok(()));
        assert!(
            judge(|f| f.under = 1_210_001).unwrap_err().contains("nvmx adds: 200,000 booked, 210,001 now (+5.0 %)")
        );
        assert!(judge(|f| f.under = 1_189_999).unwrap_err().contains("(-5.0 %)"));
        assert!(judge(|f| f.inside = 52_501).unwrap_err().contains("inside nvmx"));
        assert!(judge(|f| f.hw_exits = 94).unwrap_err().contains("exits to nvmx"));
        assert!(judge(|f| f.below = Some(946)).unwrap_err().contains("exits of the KVM below"));
        assert!(judge(|f| f.below = None).unwrap_err().contains("900 booked, - now"));
        // What the boot takes without nvmx is not its own, as long as it adds the same.
        assert_eq!(judge(|f| (f.alone, f.under) = (1_500_000, 1_700_000)), Ok(()));
        assert!(book.judge("two", &figures()).unwrap_err().contains("no row two"));
    }

    #[test]
    fn a_row_takes_the_place_of_the_one_before_and_is_read_again() {
        let mut book = book();
        let mut row = book.row("one").unwrap().clone();
        row.figures.hw_exits = 7;
        book.book(row.clone());
        book.book(Row { name: "two".into(), ..row });
        let again = Book::parse(&book.text().unwrap()).unwrap();
        assert_eq!(
            again.rows.iter().map(|r| (r.name.as_str(), r.figures.hw_exits)).collect::<Vec<_>>(),
            [("one", 7), ("two", 7)]
        );
        assert!(Book::parse(&book.text().unwrap().replace("stack/1", "stack/2")).is_err());
    }

    #[test]
    fn the_checked_in_file_is_understood_and_as_it_is_written() {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/stack.json"));
        let book = Book::read(path).unwrap();
        assert_eq!(
            book.text().unwrap(),
            std::fs::read_to_string(path).unwrap(),
            "./nvmx bench --stack --bless writes it"
        );
        for row in &book.rows {
            let machine = row.provenance.machine.as_ref();
            assert!(row.provenance.revision.is_some() && machine.is_some(), "{}: where is it from?", row.name);
        }
    }
}
