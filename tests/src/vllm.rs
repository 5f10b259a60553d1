use std::path::PathBuf;

/// A real vLLM and a model for it, as `scripts/install-vllm-cpu.sh` makes them.
#[derive(Clone, Debug)]
pub struct VllmInstallation {
    /// `BATON_VLLM`: a virtual environment.
    pub environment: PathBuf,
    /// `BATON_MODEL`: a model directory.
    pub model: PathBuf,
}

/// The installation, or `None` after saying that the test is skipped. Where `BATON_REQUIRE_VLLM` is set
/// there is no skipping.
pub fn vllm_or_skip(test: &str) -> Option<VllmInstallation> {
    let path = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.exists());
    match (path("BATON_VLLM"), path("BATON_MODEL")) {
        (Some(environment), Some(model)) => Some(VllmInstallation { environment, model }),
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
