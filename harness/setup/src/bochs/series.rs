//! The fixes of Bochs: small files in `harness/bochs/`, one a fault, applied in the order of their names.
//!
//! A file says what is wrong (`what`), what the SDM asks (`sdm`), which guest shows it (`shown_by`), and for each `[[change]]`
//! the file of Bochs' source, the shortest text that is found there once (`place`) and what stands there instead (`instead`).
//! A file without `sdm` and `shown_by` is no fix but an addition of ours.

use anyhow::{Context, Result, bail, ensure};
use memchr::memmem;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// The fixes, in order.
pub struct Series {
    fixes: Vec<Fix>,
}

/// One fault of Bochs and its cure.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fix {
    /// The file's name
    #[serde(skip)]
    pub name: String,
    /// What is wrong, or what is added
    pub what: String,
    /// What the SDM asks, with volume and title
    pub sdm: Option<String>,
    /// Guests that show it on the bare machine, each with its arguments
    #[serde(default)]
    pub shown_by: Vec<String>,
    change: Vec<Change>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    file: String,
    place: String,
    instead: String,
}

/// Files of a source tree by their path in it, as they are and as they should be: bytes, since some of Bochs' are in no encoding
/// that they name.
type Files = BTreeMap<String, (Vec<u8>, Vec<u8>)>;

impl Series {
    /// Reads all fixes of a checkout.
    ///
    /// # Errors
    /// If a file cannot be read or understood: the error names it.
    pub fn read(root: &Path) -> Result<Self> {
        Self::read_in(&root.join("harness/bochs"))
    }

    /// ... and what the build with a gdb stub has beside them.
    ///
    /// # Errors
    /// As [`Series::read`].
    pub fn read_with_gdb(root: &Path) -> Result<Self> {
        let mut series = Self::read(root)?;
        series.fixes.extend(Self::read_in(&root.join("harness/bochs/gdb"))?.fixes);
        Ok(series)
    }

    fn read_in(folder: &Path) -> Result<Self> {
        let entries = std::fs::read_dir(folder).with_context(|| format!("no fixes in {}", folder.display()))?;
        let mut paths = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
        paths.retain(|path| path.extension().is_some_and(|e| e == "toml"));
        paths.sort();
        let read = |path: &std::path::PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            Fix::parse(&name, &std::fs::read_to_string(path).with_context(|| path.display().to_string())?)
        };
        Ok(Series { fixes: paths.iter().map(read).collect::<Result<_>>()? })
    }

    /// The fixes.
    pub fn fixes(&self) -> &[Fix] {
        &self.fixes
    }

    /// A digest of what is changed, and of `more`, that does not depend on the compiler of this program: FNV-1a.
    pub fn digest(&self, more: &[&str]) -> u64 {
        let changes = self.fixes.iter().flat_map(|fix| &fix.change);
        let texts = changes.flat_map(|c| [c.file.as_str(), &c.place, &c.instead]);
        let bytes = more.iter().copied().chain(texts).flat_map(|text| text.bytes().chain([0]));
        bytes.fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
    }

    /// What becomes of the files of a source tree.
    fn applied(&self, source: &Path) -> Result<Files> {
        let mut files = Files::new();
        for (fix, change) in self.fixes.iter().flat_map(|fix| fix.change.iter().map(move |change| (fix, change))) {
            if !files.contains_key(&change.file) {
                let text = std::fs::read(source.join(&change.file))
                    .with_context(|| format!("{}: Bochs has no file {}", fix.name, change.file))?;
                files.insert(change.file.clone(), (text.clone(), text));
            }
            if let Some((_, text)) = files.get_mut(&change.file) {
                *text = change.apply(text).with_context(|| fix.name.clone())?;
            }
        }
        Ok(files)
    }

    /// Whether all fixes would go into a source tree.
    ///
    /// # Errors
    /// As [`Series::apply`].
    pub fn check(&self, source: &Path) -> Result<()> {
        self.applied(source).map(drop)
    }

    /// Applies all fixes to a source tree.
    ///
    /// # Errors
    /// If a place is not found exactly once (the error names fix and file), or a file cannot be written.
    pub fn apply(&self, source: &Path) -> Result<()> {
        for (file, (_, text)) in self.applied(source)? {
            std::fs::write(source.join(&file), text).with_context(|| format!("cannot write {file}"))?;
        }
        Ok(())
    }

    /// All fixes as one patch against a source tree, after a text that lists them; `patch -p1` takes it.
    ///
    /// # Errors
    /// As [`Series::apply`].
    pub fn patch(&self, source: &Path) -> Result<String> {
        let mut patch = String::from("Fixes of Bochs for nvmx, in the order in which they were applied.\n\n");
        self.fixes.iter().for_each(|fix| patch.push_str(&fix.text()));
        let work = tempfile::tempdir()?;
        for (file, (old, new)) in self.applied(source)? {
            std::fs::write(work.path().join("old"), old)?;
            std::fs::write(work.path().join("new"), new)?;
            let mut diff = Command::new("diff");
            diff.arg("-u").args([format!("--label=a/{file}"), format!("--label=b/{file}")]).args(["old", "new"]);
            let said = diff.current_dir(work.path()).output().context("cannot start diff")?;
            ensure!(said.status.code() == Some(1), "diff of {file}: {}", String::from_utf8_lossy(&said.stderr));
            patch.push_str(&String::from_utf8(said.stdout)?);
        }
        Ok(patch)
    }
}

impl Fix {
    fn parse(name: &str, text: &str) -> Result<Self> {
        let mut fix: Fix = toml::from_str(text).with_context(|| format!("harness/bochs/{name} is no fix"))?;
        fix.name = name.into();
        ensure!(!fix.change.is_empty(), "harness/bochs/{name} changes nothing");
        Ok(fix)
    }

    /// Its words, as a paragraph.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n", self.name);
        let shown = self.shown_by.join(", ");
        let parts =
            [("", self.what.trim()), ("SDM: ", self.sdm.as_deref().unwrap_or("").trim()), ("Seen with: ", &shown)];
        for (head, words) in parts.iter().filter(|(_, words)| !words.is_empty()) {
            text.push_str(&format!("  {head}{}\n", words.replace('\n', "\n  ")));
        }
        text + "\n"
    }
}

impl Change {
    /// Puts it in its place.
    fn apply(&self, source: &[u8]) -> Result<Vec<u8>> {
        let places: Vec<usize> = memmem::find_iter(source, &self.place).collect();
        match places[..] {
            [at] => Ok([&source[..at], self.instead.as_bytes(), &source[at + self.place.len()..]].concat()),
            _ => {
                let found = places.len();
                let first = self.place.lines().find(|l| !l.trim().is_empty()).unwrap_or("").trim();
                bail!("{} has {found} places, not one, with `{first}`", self.file)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIX: &str = "what = 'w'\nsdm = 's'\nshown_by = ['cascade']\n\
                       [[change]]\nfile = 'cpu/a.cc'\nplace = 'one;'\ninstead = '''\none;\n  more;'''\n";

    fn series(texts: &[&str]) -> Series {
        let fixes = texts.iter().enumerate().map(|(n, text)| Fix::parse(&format!("0{n}-x.toml"), text).unwrap());
        Series { fixes: fixes.collect() }
    }

    fn tree(text: &str) -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        std::fs::create_dir(tree.path().join("cpu")).unwrap();
        std::fs::write(tree.path().join("cpu/a.cc"), text).unwrap();
        tree
    }

    fn ours() -> Series {
        Series::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).unwrap()
    }

    #[test]
    fn a_fix_goes_in_once_and_only_where_it_belongs() {
        let good = tree("a\none;\nb\n");
        series(&[FIX]).check(good.path()).unwrap();
        assert_eq!(std::fs::read_to_string(good.path().join("cpu/a.cc")).unwrap(), "a\none;\nb\n");
        series(&[FIX]).apply(good.path()).unwrap();
        assert_eq!(std::fs::read_to_string(good.path().join("cpu/a.cc")).unwrap(), "a\none;\n  more;\nb\n");
        for (text, found) in [("nothing", 0), ("one; one;", 2)] {
            let error = format!("{:#}", series(&[FIX]).apply(tree(text).path()).unwrap_err());
            assert_eq!(error, format!("00-x.toml: cpu/a.cc has {found} places, not one, with `one;`"));
        }
        let elsewhere = FIX.replace("a.cc", "b.cc");
        let error = format!("{:#}", series(&[&elsewhere]).apply(good.path()).unwrap_err());
        assert!(error.starts_with("00-x.toml: Bochs has no file cpu/b.cc"), "{error}");
    }

    #[test]
    fn what_else_a_file_has_stays_byte_for_byte() {
        // As in the source of the gdb stub: quotation marks of another encoding than UTF-8.
        let tree = tree("");
        std::fs::write(tree.path().join("cpu/a.cc"), b"// \x91g\x92\none;\n\xFF").unwrap();
        series(&[FIX]).apply(tree.path()).unwrap();
        assert_eq!(std::fs::read(tree.path().join("cpu/a.cc")).unwrap(), b"// \x91g\x92\none;\n  more;\n\xFF");
    }

    #[test]
    fn a_later_fix_sees_what_an_earlier_one_left() {
        let tree = tree("one;\n");
        series(&[FIX, &FIX.replace("'one;'", "'more;'").replace("one;\n  more;", "less;")]).apply(tree.path()).unwrap();
        assert_eq!(std::fs::read_to_string(tree.path().join("cpu/a.cc")).unwrap(), "one;\n  less;\n");
    }

    #[test]
    fn the_patch_tells_what_is_wrong_and_applies() {
        let tree = tree("a\none;\nb\n");
        let patch = series(&[FIX]).patch(tree.path()).unwrap();
        assert!(
            patch.contains("00-x.toml\n  w\n  SDM: s\n  Seen with: cascade\n\n--- a/cpu/a.cc\n+++ b/cpu/a.cc\n"),
            "{patch}"
        );
        assert!(patch.ends_with("@@ -1,3 +1,4 @@\n a\n one;\n+  more;\n b\n"), "{patch}");
        assert_eq!(std::fs::read_to_string(tree.path().join("cpu/a.cc")).unwrap(), "a\none;\nb\n");
    }

    #[test]
    fn the_digest_follows_from_what_is_changed_and_not_from_the_words_about_it() {
        let digest = |text: &str, more: &[&str]| series(&[text]).digest(more);
        let first = digest(FIX, &["a"]);
        assert_eq!(first, digest(&FIX.replace("'w'", "'other words'"), &["a"]));
        assert_ne!(first, digest(FIX, &["b"]));
        assert_ne!(first, digest(&FIX.replace("more", "else"), &["a"]));
        assert_ne!(digest(FIX, &["ab"]), digest(FIX, &["a", "b"]));
        // Always the same, whatever builds the harness: FNV-1a of "a" and a zero byte.
        assert_eq!(Series { fixes: Vec::new() }.digest(&["a"]), 0x089B_E207_B544_F1E4);
    }

    #[test]
    fn a_file_that_is_no_fix_is_refused_by_name() {
        for text in ["what = 3", "what = 'w'\nchange = []", &format!("{FIX}place2 = 'x'"), "no toml"] {
            let error = Fix::parse("07-y.toml", text).err().map(|e| format!("{e:#}")).unwrap();
            assert!(error.contains("harness/bochs/07-y.toml"), "{error}");
        }
    }

    #[test]
    fn each_of_our_fixes_says_what_the_sdm_asks_and_names_a_guest_that_there_is() {
        let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../l2-guests");
        for fix in ours().fixes() {
            let (number, title) = fix.name.split_once('-').unwrap();
            assert!(number.parse::<u8>().is_ok() && !title.is_empty(), "{}", fix.name);
            assert!(!fix.what.trim().is_empty(), "{} does not say what is wrong", fix.name);
            assert_eq!(fix.sdm.is_some(), !fix.shown_by.is_empty(), "{}", fix.name);
            assert!(fix.sdm.as_ref().is_none_or(|sdm| sdm.starts_with("Volume ")), "{}", fix.name);
            for shown in &fix.shown_by {
                let (guest, args) = shown.split_once(' ').unwrap_or((shown, ""));
                let main = std::fs::read_to_string(guests.join(guest).join("src/main.rs"));
                let main = main.unwrap_or_else(|_| panic!("{}: there is no guest {guest}", fix.name));
                if let Some(part) = args.split(' ').find_map(|word| word.strip_prefix("part=")) {
                    assert!(main.contains(&format!("(\"{part}\", ")), "{}: {guest} has no part {part}", fix.name);
                }
            }
        }
    }

    #[test]
    fn no_fix_carries_more_of_the_source_than_finds_its_place() {
        for (fix, change) in ours().fixes().iter().flat_map(|f| f.change.iter().map(move |c| (f, c))) {
            assert!(change.place.lines().count() <= 4, "{}: {} lines", fix.name, change.place.lines().count());
            assert!(change.place != change.instead, "{} changes nothing", fix.name);
        }
    }
}
