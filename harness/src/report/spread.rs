//! How far measured ticks spread: for machines whose TSC counts time.
//!
//! A guest that is told `brackets=N` measures each event by N brackets, between fences, and tells the median, the tenth and the
//! ninetieth percentile and the least. What a bracket itself costs is the least of the empty one.

use super::Event;
use crate::text::number;

/// So many brackets a figure has at least.
pub const FEWEST: u64 = 30;
/// The event that stands for all.
const EVENT: &str = "cpuid";
/// From the tenth to the ninetieth percentile, as a share of the median: more is noise.
const QUIET: f64 = 0.1;

/// What to say below a table of measured figures.
pub fn lines(events: &[Event]) -> Vec<String> {
    let Some((event, low, high)) =
        events.iter().find(|e| e.event == EVENT).and_then(|e| Some((e, e.nested_p10?, e.nested_p90?)))
    else {
        return Vec::new();
    };
    let mut lines = vec![format!(
        "Each figure is a median; of a CPUID four brackets of five lie between {} and {}.",
        number(Some(low)),
        number(Some(high))
    )];
    if event.nested.is_some_and(|median| high - low > median * QUIET) {
        lines.push("That is more than a tenth apart: this host is noisy, and small differences mean nothing.".into());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wide_spread_is_told() {
        let event = |low, high| Event {
            event: "cpuid".into(),
            nested: Some(1000.0),
            nested_p10: Some(low),
            nested_p90: Some(high),
            ..Event::default()
        };
        assert_eq!(lines(&[event(990.0, 1080.0)]).len(), 1);
        assert!(lines(&[event(950.0, 1080.0)])[1].contains("noisy"));
        assert!(lines(&[]).is_empty());
    }
}
