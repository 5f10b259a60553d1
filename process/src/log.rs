//! Where a process's log goes, and in which shape: on stderr, as text or as one JSON object a line. Filters
//! have the syntax of `tracing_subscriber::EnvFilter`.
//!
//! A line about a request stands in a span that holds its `request_id`: `span.request_id` in JSON.

use tracing_subscriber::EnvFilter;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    #[default]
    Text,
    /// One object a line: `timestamp`, `level`, `target`, `message`, the line's own fields, and `span`.
    Json,
}

#[derive(Clone, Debug, clap::Args)]
pub struct LogOptions {
    /// What is logged on stderr, such as debug, or baton_coordinator=debug,info.
    #[arg(
        long = "log", value_name = "FILTER", env = "BATON_LOG", default_value = "info",
        value_parser = filter
    )]
    filter: String,
    /// Its shape.
    #[arg(long, value_enum, env = "BATON_LOG_FORMAT", default_value_t)]
    log_format: LogFormat,
}

impl LogOptions {
    /// To be called once.
    pub(crate) fn begin(&self) {
        let filter = EnvFilter::new(&self.filter);
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        match self.log_format {
            LogFormat::Text => {
                // <https://no-color.org>
                let is_welcome = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
                log.with_ansi(is_welcome && console::Term::stderr().is_term()).init();
            }
            LogFormat::Json => {
                log.json().flatten_event(true).with_current_span(true).with_span_list(false).init();
            }
        }
    }
}

fn filter(text: &str) -> Result<String, String> {
    EnvFilter::try_new(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}
