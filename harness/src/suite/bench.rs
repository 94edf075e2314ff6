//! The boot tests of the author's bench: what nvmx tells of refused entries, and how an L2 of one's own ends.

use super::{Case, Judge, Suite, all_pass, compare};
use crate::backend::{Payload, Protocol, Spec, StopAt};
use crate::boot::{Ended, Outcome};
use crate::cli::{Fields, Language};
use crate::l2::{L2, build, template};
use crate::session::Session;
use crate::transcript::refusal::Refusal;
use anyhow::Result;
use l2_protocol::Kind;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Rules that vmxtest breaks one by one in its part `explained`, at least.
const RULES: usize = 80;

/// Adds the boots and cases.
pub fn add(suite: &mut Suite, session: &Session) {
    let mut boot = |name: &str, spec: Result<Spec>, change: fn(&mut Spec)| {
        let spec = spec.map(|mut spec| {
            change(&mut spec);
            Spec { name: name.into(), ..spec }
        });
        suite.boots.insert(name.into(), spec.map_err(|e| format!("{e:#}")));
    };
    let telling = |mut spec: Spec| {
        // A later word wins.
        spec.kernel.args.push_str(" explain=on");
        spec
    };
    let explained = |fields| session.nested("vmxtest", "part=explained", fields).map(telling);
    boot("told", explained(Fields::ZeroCopy), |_| ());
    boot("told-trapped", explained(Fields::Trapped), |_| ());
    let halts = |spec: &mut Spec| spec.stop.halt = true;
    boot("halt-bare", session.bare("faulty", "halt"), halts);
    boot("halt", session.nested("faulty", "halt", Fields::Auto), halts);
    boot("until", session.nested("faulty", "spin", Fields::Auto), |spec| {
        spec.stop = StopAt { text: Some("now: spin".into()), halt: false };
    });

    let mut case = |name: &str, boots: &[&str], judge: Judge| {
        suite.cases.push(Case { name: name.into(), boots: boots.iter().map(|b| b.to_string()).collect(), judge });
    };
    let told = || -> Judge { Box::new(|o| tells_what_it_explains(o[0])) };
    case("a refused entry is told with its rule, its fields and their values", &["told"], told());
    case("a refused entry is told with trapped field access too", &["told-trapped"], told());
    let halted = || -> Judge { Box::new(|o| ended(o[0], Ended::Halted)) };
    case("a guest that halts with interrupts off on the bare machine is over", &["halt-bare"], halted());
    case("an L2 that halts with interrupts off under nvmx is over", &["halt"], halted());
    case("a boot ends at the text that is waited for", &["until"], Box::new(|o| ended(o[0], Ended::Text)));
}

/// Adds the boots and cases of the templates of `./nvmx new l2`, which are built for it.
///
/// # Errors
/// If a template cannot be written.
pub fn add_templates(suite: &mut Suite, session: &Session) -> Result<()> {
    for (language, name) in [(Language::C, "c"), (Language::Rust, "rust")] {
        let image = if session.dry { Ok(PathBuf::new()) } else { built(session, language, name) };
        let spec = |image: &PathBuf| {
            let kernel = Payload::new(image, "");
            Spec { protocol: Protocol::Multiboot1, ..session.spec(format!("new-{name}-bare"), kernel, Vec::new()) }
        };
        let bare = image.as_ref().map(spec).map_err(|e| format!("{e:#}"));
        let under =
            bare.clone().map(|bare| session.under_nvmx(&bare, format!("new-{name}"), &session.options(Fields::Auto)));
        let boots = [format!("new-{name}-bare"), format!("new-{name}")];
        suite.boots.insert(boots[0].clone(), bare);
        suite.boots.insert(boots[1].clone(), under);
        suite.cases.push(Case {
            name: format!("the template of a guest hypervisor in {name} builds, and sees under nvmx what it sees bare"),
            boots: boots.to_vec(),
            judge: Box::new(|o| compare::agree(o[0], o[1])),
        });
    }
    Ok(())
}

/// The image of a template, made and built in a folder of its own.
fn built(session: &Session, language: Language, name: &str) -> Result<PathBuf> {
    let folder = session.paths.target.join("nvmx/new").join(name);
    let sources = tempfile::tempdir()?;
    template::write(&sources.path().join("l2"), language, &session.paths.root)?;
    std::fs::create_dir_all(&folder)?;
    // Over the old one, so that cargo need not build the kit again.
    nvmx_setup::paths::copy_tree(&sources.path().join("l2"), &folder)?;
    build::build(&session.ui, session, &L2::Project(folder))
}

fn ended(outcome: &Outcome, how: Ended) -> Result<(), String> {
    if outcome.ended == how { Ok(()) } else { Err(format!("it ended as {:?}, not {how:?}", outcome.ended)) }
}

/// Every rule that the guest was explained is among those that were told, each with a symbol of the guest, and the fields of
/// the rule with values.
fn tells_what_it_explains(outcome: &Outcome) -> Result<(), String> {
    all_pass(&[outcome])?;
    let said = &outcome.transcript;
    let told: Vec<Refusal> =
        said.of_kind(Kind::Refused).filter_map(|record| Refusal::of(record, outcome.l2.as_deref())).collect();
    let names: BTreeSet<&str> = told.iter().filter_map(|refusal| refusal.rule.as_deref()).collect();
    let explained: BTreeSet<&str> =
        said.of_kind(Kind::Explained).filter_map(|record| record.get("rule")).filter(|rule| is_rule(rule)).collect();
    if explained.len() < RULES {
        return Err(format!("the guest was explained only {} rules", explained.len()));
    }
    if let Some(rule) = explained.difference(&names).next() {
        return Err(format!("{rule} was explained to the guest and not told"));
    }
    let Some(refusal) = told.iter().find(|refusal| refusal.symbol.is_none()) else { return with_values(&told) };
    Err(format!("{} at {} has no symbol", refusal.instruction, refusal.rip))
}

fn is_rule(name: &str) -> bool {
    nvmx::rules::checks::CheckId::ALL.iter().any(|check| check.name() == name)
}

fn with_values(told: &[Refusal]) -> Result<(), String> {
    let empty = |refusal: &&Refusal| {
        refusal.count == 1
            && refusal.rule.as_deref().is_some_and(|rule| is_rule(rule) && !rule.starts_with("MsrLoad"))
            && refusal.fields.is_empty()
    };
    match told.iter().find(empty) {
        Some(refusal) => Err(format!("{} has no values", refusal.rule.as_deref().unwrap_or("?"))),
        None => Ok(()),
    }
}

/// The suite's boots do not tell refusals: thousands of states would only cost time.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Explain;
    use nvmx_setup::ui::Ui;

    #[test]
    fn only_who_asks_is_told() {
        let session = Session::dry(&Ui::new(false)).unwrap();
        assert!(session.options(Fields::Auto).contains("explain=off"));
        let session = session.explaining(Explain::Text);
        assert!(session.options(Fields::Auto).contains("explain=on"));
    }
}
