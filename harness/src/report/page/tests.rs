use super::super::tests::sample;
use super::*;
use crate::transcript::stack::StackLevel;
use nvmx_setup::program;
use std::process::Command;

fn run() -> Run {
    let level = |level: &str, name: &str| StackLevel {
        level: level.into(),
        name: name.into(),
        version: "1 <x>".into(),
        cpu: "a CPU".into(),
        features: vec!["ept".into()],
    };
    let levels = vec![level("L0", "Bochs"), level("L1", "nvmx"), level("L2", "cascade"), level("L3", "payload")];
    Run::new(levels, "zero-copy".into(), Unit::Instructions, sample(), &[])
}

fn rendered(format: Format) -> String {
    let (run, boot) = (run(), crate::trace::file::tests::boot());
    let provenance = [("command".to_string(), "./nvmx run --l2 <mine>".to_string())];
    let page = Page { l2: "cascade", run: &run, unit: Unit::Instructions, trace: Some(&boot), provenance: &provenance };
    page.render(format)
}

#[test]
fn the_page_needs_nothing_from_elsewhere_and_takes_no_markup_from_names() {
    let page = rendered(Format::Html);
    for outside in ["http:", "https:", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("run --l2 &lt;mine&gt;") && page.contains("1 &lt;x&gt;") && !page.contains("<mine>"));
}

#[test]
fn the_picture_has_the_guest_that_does_not_introduce_itself() {
    let (mut run, boot) = (run(), crate::trace::file::tests::boot());
    let drawn = |run: &Run| {
        let page = Page { l2: "cascade", run, unit: Unit::Instructions, trace: Some(&boot), provenance: &[] };
        page.render(Format::Html)
    };
    assert!(drawn(&run).contains(">payload 1 &lt;x&gt;<") && !drawn(&run).contains("guest of"));
    run.stack.pop();
    assert!(drawn(&run).contains(">guest of cascade<"));
}

#[test]
fn markdown_and_csv_have_the_same_figures() {
    let text = rendered(Format::Markdown);
    assert!(text.contains("| cpuid | L2 | 3 | 260 | 1,200 | 2 | 900 | 19 |"), "{text}");
    assert!(text.contains("| L3 | CPUID | 1 | 1 | 84.2 % | 160 | 160 | 160 | 160 | 160 |"), "{text}");
    assert!(text.contains("- L1: nvmx 1 <x>") && text.contains("- command: ./nvmx run"), "{text}");
    let csv = rendered(Format::Csv);
    assert!(csv.starts_with("event,handled_by,count,native,one_level,nested,"), "{csv}");
    assert!(csv.contains("\ncpuid,L2,1000,3,260,1200,2,900,19,"), "{csv}");
    let columns = csv.lines().next().unwrap().split(',').count();
    assert!(csv.lines().all(|line| line.split(',').count() == columns));
}

#[test]
fn the_name_of_the_file_says_how_it_is_written() {
    assert_eq!(Format::of(Path::new("a.HTML")).unwrap(), Format::Html);
    assert_eq!(Format::of(Path::new("a.md")).unwrap(), Format::Markdown);
    assert!(Format::of(Path::new("a.txt")).unwrap_err().to_string().contains(".html, .md or .csv"));
    let folder = tempfile::tempdir().unwrap();
    let page = |name: &str| Format::prepare(&folder.path().join(name));
    assert!(page("a.html").is_ok() && Format::prepare(Path::new("-")).is_ok());
    for name in ["a.md", "a.csv", "a"] {
        assert!(page(name).err().unwrap().to_string().contains("must end in .html"), "{name}");
        assert!(!folder.path().join(name).exists(), "{name}");
    }
}

/// What a browser makes of the page: sections, sorting, search, choice of a tree, theme, keys. Only where there is a Chromium.
#[test]
fn a_browser_shows_sorts_searches_and_switches() {
    let Some(browser) = ["chromium", "chromium-browser", "google-chrome"].iter().find_map(|name| program(name)) else {
        eprintln!("no Chromium here: the page is not looked at");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    // The page asks itself and writes what it found where it can be read.
    let check = "<script>window.addEventListener('load', () => { const q = s => document.querySelectorAll(s); \
        const out = []; const say = (k, v) => out.push(k + '=' + v); \
        say('sections', [...q('main section')].map(s => s.id).join('+')); \
        say('broken', [...q('svg *')].filter(e => [...e.attributes].some(a => /NaN|Infinity/.test(a.value))).length); \
        const wide = document.documentElement; say('overflow', wide.scrollWidth > wide.clientWidth); \
        const first = () => q('#table tbody tr')[0].cells[0].textContent; \
        const head = [...q('#table th button')].find(b => b.textContent === 'under nvmx'); \
        head.click(); say('dearest', first()); head.click(); say('cheapest', first()); \
        const filter = q('input.filter')[0]; filter.value = 'l2_'; filter.dispatchEvent(new Event('input')); \
        say('found', [...q('#table tbody tr')].filter(r => !r.hidden).map(r => r.cells[0].textContent).join('+')); \
        const trees = () => [...q('.tree')].filter(t => !t.hidden).length; say('trees', trees()); \
        const select = q('select.trees')[0]; select.selectedIndex = 1; select.dispatchEvent(new Event('change')); \
        say('second', trees() + (q('.tree')[1].hidden ? 'hidden' : 'shown')); \
        const key = k => document.dispatchEvent(new KeyboardEvent('keydown', { key: k, bubbles: true })); \
        const back = () => getComputedStyle(document.body).backgroundColor; const before = back(); key('t'); \
        say('theme', before !== back()); key('2'); say('focus', document.activeElement.id); \
        const pre = document.createElement('pre'); pre.id = 'found'; pre.textContent = out.join(';'); \
        document.body.append(pre); });</script></body>";
    let page = rendered(Format::Html);
    let file = folder.path().join("page.html");
    std::fs::write(&file, page.replace("</body>", check)).unwrap();
    let said = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--dump-dom"])
        .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
        .arg(format!("file://{}", file.display()))
        .output()
        .unwrap();
    let dom = String::from_utf8_lossy(&said.stdout);
    let found = dom.rsplit_once("<pre id=\"found\">").and_then(|(_, rest)| Some(rest.split_once("</pre>")?.0));
    let found =
        found.unwrap_or_else(|| panic!("the page's script did not run: {}", String::from_utf8_lossy(&said.stderr)));
    let expected = "sections=stack+table+stages+reasons+depth+spread+timeline+provenance;broken=0;overflow=false;dearest=cpuid;\
                    cheapest=l2_cpuid;found=l2_cpuid;trees=1;second=1shown;theme=true;focus=table";
    assert_eq!(found, expected);
}
