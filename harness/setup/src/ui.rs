//! What the user sees: steps with elapsed time on stderr, results and guests' lines on stdout.

use crate::output::Output;
use crate::proc;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use owo_colors::{OwoColorize, Style};
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The terminal. Cheap to clone; all clones draw on the same screen.
#[derive(Clone)]
pub struct Ui {
    bars: MultiProgress,
    live: bool,
    colour: bool,
    /// Show nvmx's own log and the commands that run
    pub verbose: bool,
    /// What VMX refused is shown for programs
    pub json_refusals: bool,
    stdout: Arc<Stdout>,
    /// When the last line came
    spoke: Arc<Mutex<Instant>>,
}

/// What became of standard output.
#[derive(Default)]
struct Stdout {
    /// It belongs to a report: people read standard error
    reserved: AtomicBool,
    /// The first write that failed
    failed: OnceLock<String>,
}

/// Without a terminal that shows a step under way, a line says after so much silence that it still goes on.
const SILENCE: Duration = Duration::from_secs(3);

impl Ui {
    /// Looks at the terminal: colour only on one, and never with `NO_COLOR`.
    pub fn new(verbose: bool) -> Self {
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        Ui {
            bars: MultiProgress::new(),
            live: std::io::stderr().is_terminal() && !dumb,
            colour: std::io::stdout().is_terminal() && !no_colour && !dumb,
            verbose,
            json_refusals: false,
            stdout: Arc::default(),
            spoke: Arc::new(Mutex::new(Instant::now())),
        }
    }

    /// Columns of the terminal that standard output is, if it is one.
    pub fn width(&self) -> Option<usize> {
        let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
        Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
    }

    /// A line of result, on stdout.
    pub fn line(&self, text: &str) {
        if self.stdout.reserved.load(Ordering::Relaxed) {
            return self.note(text);
        }
        *held(&self.spoke) = Instant::now();
        self.bars.suspend(|| {
            let mut out = std::io::stdout().lock();
            // The work goes on, since it may have other results; in the end it counts.
            if let Err(error) = writeln!(out, "{text}").and_then(|()| out.flush()) {
                let _ = self.stdout.failed.set(error.to_string());
            }
        });
    }

    /// Keeps standard output free for a report, if it goes there: what else is to be read goes to standard error.
    pub fn reserve_stdout(&self, output: Option<&Output>) {
        if output.is_some_and(Output::is_stdout) {
            self.stdout.reserved.store(true, Ordering::Relaxed);
        }
    }

    /// Why standard output could not be written, if it could not.
    pub fn stdout_failure(&self) -> Option<&str> {
        self.stdout.failed.get().map(String::as_str)
    }

    /// A remark, on stderr.
    pub fn note(&self, text: &str) {
        *held(&self.spoke) = Instant::now();
        self.bars.suspend(|| {
            let _ = writeln!(std::io::stderr(), "{text}");
        });
    }

    /// A remark for `--verbose` only.
    pub fn detail(&self, text: &str) {
        if self.verbose {
            self.note(text);
        }
    }

    /// `text` in a style, if colour is wanted.
    pub fn paint(&self, text: &str, style: Style) -> String {
        if self.colour { text.style(style).to_string() } else { text.to_string() }
    }

    /// Starts a step that may take long.
    pub fn step(&self, what: &str) -> Step {
        let bar = self.live.then(|| {
            let bar = self.bars.add(ProgressBar::new_spinner());
            let style = ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.set_prefix(what.to_string());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        let beat = bar.is_none().then(|| {
            self.note(&format!("{what} ..."));
            Beat::start(self.clone(), what.to_string())
        });
        Step { ui: self.clone(), bar, beat, start: Instant::now() }
    }

    /// Says that `what` goes on, and where it is, if nothing was said for long; how long it may stay silent from now on.
    fn beat(&self, what: &str, start: Instant, at: &str) -> Duration {
        let silent = held(&self.spoke).elapsed();
        if silent < SILENCE {
            return SILENCE.saturating_sub(silent);
        }
        if !proc::interrupted() {
            let colon = if at.is_empty() { "" } else { ": " };
            self.note(&format!("{what} ... {} s{colon}{at}", start.elapsed().as_secs()));
        }
        SILENCE
    }
}

/// Locks a mutex; what a thread that panicked has left in it is as good as any.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Speaks up for a step that is silent for long, until it is dropped.
struct Beat {
    at: Arc<Mutex<String>>,
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Beat {
    fn start(ui: Ui, what: String) -> Self {
        let at: Arc<Mutex<String>> = Arc::default();
        let (end, ended) = mpsc::channel();
        let (now, start) = (at.clone(), Instant::now());
        let thread = std::thread::spawn(move || {
            let mut wait = SILENCE;
            while ended.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                let at = held(&now).clone();
                wait = ui.beat(&what, start, &at);
            }
        });
        Beat { at, end: Some(end), thread: Some(thread) }
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A step under way; gone from the screen when dropped.
pub struct Step {
    ui: Ui,
    bar: Option<ProgressBar>,
    beat: Option<Beat>,
    start: Instant,
}

impl Step {
    /// Shows what the step is at.
    pub fn at(&mut self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.trim().to_string());
        }
        if let Some(beat) = &self.beat {
            *held(&beat.at) = text.trim().to_string();
        }
    }

    /// Ends the step with a line that stays.
    pub fn done(self, text: &str) {
        let (ui, seconds) = (self.ui.clone(), self.start.elapsed().as_secs_f64());
        drop(self);
        ui.note(&format!("{text} ({seconds:.1} s)"));
    }

    /// Time since the step began.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_speaks_up_only_after_silence() {
        let ui = Ui::new(false);
        let start = Instant::now();
        assert!(ui.beat("x", start, "") > Duration::ZERO);
        let long_ago = start.checked_sub(2 * SILENCE).unwrap();
        *held(&ui.spoke) = long_ago;
        let silent_since = *held(&ui.spoke);
        assert_eq!(ui.beat("x", start, "y"), SILENCE);
        assert!(*held(&ui.spoke) > silent_since, "it said something");
    }

    #[test]
    fn a_line_of_somebody_else_is_as_good() {
        let ui = Ui::new(false);
        *held(&ui.spoke) = Instant::now().checked_sub(2 * SILENCE).unwrap();
        ui.clone().note("a remark");
        assert!(held(&ui.spoke).elapsed() < SILENCE);
    }

    #[test]
    fn a_step_ends_at_once() {
        let start = Instant::now();
        drop(Beat::start(Ui::new(false), "x".into()));
        assert!(start.elapsed() < SILENCE);
    }
}
