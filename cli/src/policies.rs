//! `baton policies`.

use std::process::ExitCode;

use baton_core::policy::POLICIES;

use crate::terminal::{Terminal, strong};

pub(crate) fn run() -> ExitCode {
    let mut terminal = Terminal::stdout();
    let width = POLICIES.iter().map(|entry| entry.name.len()).max().unwrap_or_default();
    for entry in POLICIES {
        let name = format!("{:width$}", entry.name);
        terminal.say(&format!("{}  {}", strong(&name), entry.about));
    }
    ExitCode::SUCCESS
}
