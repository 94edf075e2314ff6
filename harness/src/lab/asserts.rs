//! What experiments assert by counts.

use super::experiment::{Judgement, Verdict};
use super::figures::Figures;
use super::text;

/// Collects what an experiment asserts. A figure that is not there makes it "not measured".
#[derive(Default)]
pub struct Asserts {
    all: Vec<(String, bool)>,
    unknown: bool,
}

impl Asserts {
    /// A figure that must be there.
    pub fn need(&mut self, value: Option<f64>) -> f64 {
        self.unknown |= value.is_none();
        value.unwrap_or(f64::NAN)
    }

    /// A statement.
    pub fn that(&mut self, what: impl Into<String>, holds: bool) {
        self.all.push((what.into(), holds));
    }

    /// Two counts per event are the same, but for what a few events at the start and the end may add.
    pub fn about(&mut self, what: &str, value: Option<f64>, wanted: f64) {
        let value = self.need(value);
        self.that(format!("{what}: {}", text::number(Some(value))), (value - wanted).abs() <= 0.12 * wanted.max(0.4));
    }

    /// Hardware exits of an event: exactly so many with VMCS shadowing; without it, or with what a KVM below offers, at least
    /// as many.
    pub fn hardware(&mut self, figures: &Figures, what: &str, value: Option<f64>, wanted: f64) {
        if figures.shadowing() && !figures.below {
            return self.about(what, value, wanted);
        }
        let value = self.need(value);
        let place = if figures.below { "with KVM below" } else { "without VMCS shadowing" };
        self.that(format!("{what}: {}, {place}", text::number(Some(value))), value > 0.88 * wanted);
    }

    /// The end: `verdict` if all of it is so.
    pub fn judge(self, verdict: Verdict, levels: [String; 3], why: String) -> Judgement {
        let verdict = match self.all.iter().all(|(_, holds)| *holds) {
            _ if self.unknown => Verdict::NotMeasured,
            true => verdict,
            false => Verdict::Contradicted,
        };
        Judgement { verdict, levels, why, asserted: self.all }
    }
}
