//! `explain`: what an exit reason, a rule, a field, an error number or an event is, from nvmx's own tables and the pages in
//! `docs/`.

use crate::cli::ExplainArgs;
use anyhow::Result;
use nvmx::rules::checks::CheckId;
use nvmx::vmx::Field;
use nvmx::vmx::VmxError;
use nvmx::vmx::exit::BasicReason;
use nvmx::vmx::field::{Area, Home, Width};
use nvmx_setup::error::Stop;
use nvmx_setup::ui::Ui;
use std::collections::BTreeSet;
use std::sync::LazyLock;

/// The pages, by name.
const PAGES: [(&str, &str); 5] = [
    ("docs/architecture.md", include_str!("../../../docs/architecture.md")),
    ("docs/support.md", include_str!("../../../docs/support.md")),
    ("docs/checks.md", include_str!("../../../docs/checks.md")),
    ("docs/glossary.md", include_str!("../../../docs/glossary.md")),
    ("docs/invariants.md", include_str!("../../../docs/invariants.md")),
];
const README: &str = include_str!("../../../README.md");
/// The section of the architecture page that follows one exit: shown with events that L2 handles.
const WALK: &str = "## The life of one exit: CPUID of L3, handled by L2";

/// Runs the command.
///
/// # Errors
/// [`Stop::Usage`] if nothing is known of the word.
pub fn run(ui: &Ui, args: &ExplainArgs) -> Result<()> {
    let text = args.words.join(" ");
    let found = explain(text.trim());
    if found.is_empty() {
        let help = "exit 48, error 7, field 0x6c14, or the name of a rule, exit reason, field or event";
        return Err(Stop::Usage(format!("nothing is known of `{text}`: {help}")).into());
    }
    found.iter().for_each(|line| ui.line(line));
    Ok(())
}

/// What is known of a word.
fn explain(text: &str) -> Vec<String> {
    let (kind, word) = match text.split_once(char::is_whitespace) {
        Some((kind, word)) if ["exit", "error", "field", "rule", "event", "reason"].contains(&kind) => {
            (kind, word.trim())
        }
        _ => ("", text),
    };
    let wants = |name: &str| kind.is_empty() || kind == name || name == "exit" && kind == "reason";
    let number = number(word);
    let named = |name: &str| same(name, word);
    let mut lines = Vec::new();
    // An exit that L3 raises is an event of the same name.
    let mut events = BTreeSet::new();
    if wants("event") {
        events.insert(word.to_lowercase());
    }
    for reason in BasicReason::KNOWN.iter().filter(|_| wants("exit")) {
        if number == Some(u64::from(reason.0)) || reason.name().is_some_and(named) {
            lines.extend(of_reason(*reason));
            events.extend(reason.name().map(str::to_lowercase));
        }
    }
    for error in VmxError::ALL.iter().filter(|_| wants("error")) {
        if number == Some(*error as u64) || named(error.name()) {
            lines.push(format!("VM-instruction error {}, {}: {}", *error as u32, error.name(), error.text()));
        }
    }
    for check in CheckId::ALL.iter().filter(|check| wants("rule") && named(check.name())) {
        lines.extend(of_rule(*check));
    }
    if wants("field") {
        let by_number = number.and_then(|n| u32::try_from(n).ok()).and_then(Field::decode);
        let by_name = || Field::ALL.iter().find(|field| named(field.name())).map(|field| (*field, false));
        // A small number is an exit reason unless it is called a field.
        let small = number.is_some_and(|n| n < 0x100) && kind.is_empty();
        lines.extend(
            by_number.filter(|_| !small).or_else(by_name).into_iter().flat_map(|(field, high)| of_field(field, high)),
        );
    }
    events.iter().for_each(|event| lines.extend(of_event(event)));
    lines
}

fn same(name: &str, word: &str) -> bool {
    let plain =
        |text: &str| text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect::<String>();
    !word.is_empty() && plain(name) == plain(word)
}

fn number(word: &str) -> Option<u64> {
    let word = word.to_lowercase();
    if let Some(digits) = word.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).ok();
    }
    match word.strip_suffix('h') {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => word.parse().ok(),
    }
}

fn of_reason(reason: BasicReason) -> Vec<String> {
    let name = reason.name().unwrap_or("?");
    let mut lines = vec![format!("Exit reason {} ({:#x}): {name}", reason.0, reason.0)];
    lines.extend(pages_with(&name.replace('_', " "), name));
    lines
}

fn of_rule(check: CheckId) -> Vec<String> {
    let mut lines = vec![
        format!("Rule {}: {}", check.name(), check.text()),
        format!("SDM vol. 3C, chapter \"VM Entries\", \"{}\"", check.section()),
    ];
    lines.extend(check.fields().iter().map(|field| format!("  {} ({:#x})", field.name(), field.encoding())));
    lines.extend(pages_with(check.name(), check.name()));
    lines
}

fn of_field(field: Field, high: bool) -> Vec<String> {
    let width = match field.width() {
        Width::W16 => "16 bits",
        Width::W32 => "32 bits",
        Width::W64 => "64 bits",
        Width::Natural => "natural width",
    };
    let area = match field.area() {
        Area::Control => "control field",
        Area::ExitInfo => "VM-exit information, read-only",
        Area::Guest => "guest-state area",
        Area::Host => "host-state area",
    };
    let home = match field.home() {
        Home::Cache => "nvmx's copy of vmcs12",
        Home::Vmcs02 => "vmcs02 itself, where the processor checks it",
        Home::Watched => "vmcs02, and nvmx sees each write of L2",
    };
    let high = if high { ", the upper half" } else { "" };
    let mut lines = vec![
        format!("Field {} ({:#x}{high}): {width}, {area}", field.name(), field.encoding()),
        format!("  what L2 wrote lives in {home}"),
    ];
    for check in CheckId::ALL.iter().filter(|check| check.fields().contains(&field)) {
        lines.push(format!("  rule {}: {}", check.name(), check.text()));
    }
    lines
}

/// An event of `./nvmx run`: its row in the README's table, and the walk through one exit.
fn of_event(word: &str) -> Vec<String> {
    let Some(table) = README.split("<!-- output of ./nvmx run: begin -->").nth(1) else { return Vec::new() };
    let lines: Vec<&str> = table.lines().take_while(|line| !line.starts_with("<!--")).collect();
    let is_row = |line: &&&str| line.split_whitespace().next() == Some(word) && line.split_whitespace().count() > 8;
    let Some(row) = lines.iter().find(is_row) else { return Vec::new() };
    let head = lines.iter().position(|line| line.starts_with(" event "));
    let mut text = vec![format!("Event {word} of ./nvmx run, as counted for the README:")];
    text.extend(head.into_iter().flat_map(|at| lines[at..].iter().take(3)).map(|line| line.to_string()));
    text.push(row.to_string());
    let reflected = row.split_whitespace().nth(1) == Some("L2");
    if reflected {
        text.push(String::new());
        text.extend(section(PAGES[0].1, WALK));
    }
    text
}

/// A section of a page, with its subsections.
fn section(page: &str, head: &str) -> Vec<String> {
    let from = page.lines().skip_while(|line| *line != head);
    from.enumerate()
        .take_while(|(i, line)| *i == 0 || !line.starts_with("## "))
        .map(|(_, line)| line.to_string())
        .collect()
}

/// Rows and paragraphs of the pages that have one of these words.
fn pages_with(one: &str, other: &str) -> Vec<String> {
    /// A page's name, a line of it, and its plain words
    static LINES: LazyLock<Vec<(&str, &str, String)>> = LazyLock::new(|| {
        let lines = |(name, page): (&'static str, &'static str)| page.lines().map(move |l| (name, l, plain_words(l)));
        PAGES.into_iter().flat_map(lines).collect()
    });
    const MOST: usize = 8;
    let wanted = [one, other].map(plain_words);
    let has = |words: &String| wanted.iter().any(|wanted| words.contains(wanted));
    let found = LINES.iter().filter(|(.., words)| has(words)).take(MOST);
    found.map(|(name, line, _)| format!("  {name}: {}", line.trim().trim_matches('|').trim())).collect()
}

/// In small letters, between blanks; one or many of something is the same.
fn plain_words(text: &str) -> String {
    let plain = text.to_lowercase().replace(|c: char| !c.is_alphanumeric() && c != '_', " ");
    format!(" {} ", plain.split_whitespace().map(|word| word.trim_end_matches('s')).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(text: &str) -> String {
        explain(text).into_iter().next().unwrap_or_default()
    }

    #[test]
    fn words_of_every_kind_are_explained() {
        assert_eq!(first("exit 48"), "Exit reason 48 (0x30): EPT_VIOLATION");
        assert_eq!(first("ept violation"), first("exit 48"));
        assert_eq!(first("0x6c14"), "Field HOST_RSP (0x6c14): natural width, host-state area");
        assert_eq!(first("host_rsp"), first("6C14H"));
        assert!(first("GuestRflagsReserved").starts_with("Rule GuestRflagsReserved: "));
        assert!(first("error 7").starts_with("VM-instruction error 7, EntryInvalidControlField"));
        assert!(first("event cpuid").starts_with("Event cpuid"));
        assert!(explain("wibble").is_empty() && explain("").is_empty() && explain("exit 4711").is_empty());
        assert!(explain("field 0x4000").join(" ").contains("rule PinControls"));
        // A bare number is all that it can be.
        let seven = explain("7").join("\n");
        assert!(seven.contains("Exit reason 7") && seven.contains("error 7"), "{seven}");
    }

    #[test]
    fn everything_that_has_a_name_is_found_by_it() {
        for check in CheckId::ALL {
            assert!(first(check.name()).starts_with("Rule "), "{}", check.name());
        }
        for field in Field::ALL {
            assert!(explain(field.name()).iter().any(|line| line.starts_with("Field ")), "{}", field.name());
        }
        for reason in BasicReason::KNOWN {
            assert!(explain(&format!("exit {}", reason.0)).len() == explain(&format!("reason {}", reason.0)).len());
            assert!(first(reason.name().unwrap()).starts_with("Exit reason"), "{reason}");
        }
    }

    #[test]
    fn a_reflected_event_comes_with_its_counts_and_the_walk() {
        let text = explain("cpuid").join("\n");
        assert!(text.contains("Exit reason 10") && text.contains("VMPTRLD") && text.contains(WALK), "{text}");
        assert!(!text.contains("## Other ways of an exit"));
        assert_eq!(text, explain("exit 10").join("\n"));
    }

    #[test]
    fn an_exit_comes_with_what_the_pages_say_of_it_in_their_words() {
        let text = explain("exit 48").join("\n");
        assert!(text.contains("docs/support.md: EPT violations and misconfigurations to L2"), "{text}");
    }
}
