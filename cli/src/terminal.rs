//! What people read: lines on stdout, a part that is drawn anew on a terminal, complaints on stderr.

use std::io::Write as _;

use console::{StyledObject, Term, style, truncate_str};

/// Whether stdout is something that can be drawn on, and in colour.
pub(crate) struct Terminal {
    term: Term,
    is_live: bool,
    /// Lines that were drawn last and can be drawn over.
    drawn: Vec<String>,
}

impl Terminal {
    pub(crate) fn stdout() -> Self {
        let term = Term::stdout();
        let is_live = term.is_term() && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
        console::set_colors_enabled(is_live && colour_is_welcome());
        Self { term, is_live, drawn: Vec::new() }
    }

    /// Elsewhere, what changes is told in lines of its own.
    pub(crate) fn is_live(&self) -> bool {
        self.is_live
    }

    /// Says something for good; what is drawn stays below it.
    pub(crate) fn say(&mut self, text: &str) {
        let drawn = std::mem::take(&mut self.drawn);
        self.erase(drawn.len());
        self.write(text.split('\n'));
        self.redraw(drawn);
    }

    /// Draws these lines in place of those drawn before. Does nothing where nothing can be drawn over.
    pub(crate) fn draw(&mut self, lines: Vec<String>) {
        if self.is_live {
            self.erase(self.drawn.len());
            self.redraw(lines);
        }
    }

    fn redraw(&mut self, mut lines: Vec<String>) {
        // A line that wraps, or scrolls away, could not be drawn over.
        let (height, width) = self.term.size();
        lines.truncate(usize::from(height).saturating_sub(2).max(1));
        self.write(lines.iter().map(|line| truncate_str(line, width.into(), "…")));
        self.drawn = lines;
    }

    fn erase(&self, lines: usize) {
        if lines > 0 {
            let _ = self.term.clear_last_lines(lines);
        }
    }

    /// One write for all lines: the picture does not flicker. A stdout that is gone is no reason to
    /// stop serving.
    fn write(&self, lines: impl Iterator<Item = impl AsRef<str>>) {
        let mut text = String::new();
        for line in lines {
            text.push_str(line.as_ref());
            text.push('\n');
        }
        let mut term = &self.term;
        let _ = term.write_all(text.as_bytes());
        let _ = term.flush();
    }
}

/// <https://no-color.org>
fn colour_is_welcome() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Says something beside what was asked for: stdout stays what a program can read.
pub(crate) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Says why the program fails.
pub(crate) fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "baton: {text}");
}

/// For headings and whatever is less important than its neighbours.
pub(crate) fn faint(text: &str) -> StyledObject<&str> {
    style(text).dim()
}

/// For what is as it should be.
pub(crate) fn good(text: &str) -> StyledObject<&str> {
    style(text).green()
}

/// For what is on its way.
pub(crate) fn pending(text: &str) -> StyledObject<&str> {
    style(text).yellow()
}

/// For what is broken.
pub(crate) fn bad(text: &str) -> StyledObject<&str> {
    style(text).red()
}

/// For what to look at first.
pub(crate) fn strong(text: &str) -> StyledObject<&str> {
    style(text).bold()
}
