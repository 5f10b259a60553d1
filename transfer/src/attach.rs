//! How a producer lets a consumer in, over any channel: what it asks for, and the handoff that it means, or a word
//! of why not.

use async_trait::async_trait;
use futures::future::BoxFuture;

use crate::{
    channel::{ExportStream, Exports, Refusal, Subscription, TransferError},
    frame::{ProducerFrame, VERSION},
};

/// What an export answers to who wants to attach.
pub(crate) type Attached = Result<Box<dyn ExportStream>, Refusal>;

/// The way to a consumer that has asked for a handoff and has been given none of it.
#[async_trait]
pub(crate) trait Guest: Send {
    /// Waits for the handoff, while telling the consumer that this side lives.
    async fn wait_for(
        &mut self,
        attaching: BoxFuture<'_, Attached>,
    ) -> Result<Attached, TransferError>;

    /// Says why nothing (more) will come.
    async fn last_frame(&mut self, frame: ProducerFrame);

    /// Ends it without a word.
    fn turn_away(&mut self, error: &TransferError);
}

/// What was asked for, where that came and can be told from noise.
pub(crate) async fn understood<T>(
    guest: &mut dyn Guest,
    asked: Result<T, TransferError>,
) -> Option<T> {
    let error = match asked {
        Ok(asked) => return Some(asked),
        Err(error) => error,
    };
    tracing::debug!(%error, "no subscription came over a handoff's stream");
    if matches!(error, TransferError::Version { .. }) {
        guest.last_frame(ProducerFrame::WrongVersion { ours: VERSION }).await;
    } else {
        guest.turn_away(&error);
    }
    None
}

/// The handoff's blocks, where it is this consumer's to have.
pub(crate) async fn attached(
    guest: &mut dyn Guest,
    exports: &dyn Exports,
    subscription: &Subscription,
    peer: [u8; 32],
) -> Option<Box<dyn ExportStream>> {
    let handoff = subscription.handoff;
    match guest.wait_for(exports.attach(subscription, peer)).await {
        Ok(Ok(stream)) => return Some(stream),
        Ok(Err(refusal)) => {
            tracing::debug!(%handoff, %refusal, "refused a subscription");
            guest.last_frame(ProducerFrame::Refused(refusal)).await;
        }
        Err(error) => {
            tracing::debug!(%handoff, %error, "a consumer did not wait for its handoff");
            guest.turn_away(&error);
        }
    }
    None
}
