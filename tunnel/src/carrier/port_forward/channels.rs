//! `v4.channel.k8s.io`: what every API server speaks inside the messages of a port-forward.
//!
//! Every message is binary: a channel byte, then data. Channel 0 is the port's data, channel 1 its error text, and each
//! channel begins with two bytes that repeat the port. Nothing can be half-closed. Source: `httpstream/wsstream` and
//! `cri/streaming/portforward` of Kubernetes. Pure: messages in, data or an error out.

use bytes::{Buf, Bytes};

use super::PortForwardError;

/// The server's side of the protocol.
#[derive(Debug)]
pub struct Channels {
    port: u16,
    begun: [usize; 2],
    /// Data received and not yet taken.
    data: Bytes,
}

/// What a message of data begins with.
pub(super) const DATA: u8 = 0;
const ERROR: u8 = 1;

/// Largest message accepted; API servers send 32 KiB.
pub(super) const RECEIVED_MAX: usize = 1 << 20;

impl Channels {
    /// The state before the first message.
    pub fn new(port: u16) -> Self {
        Self {
            port,
            begun: [0; 2],
            data: Bytes::new(),
        }
    }

    /// Takes one binary message. What an earlier one carried must have been taken.
    ///
    /// # Errors
    /// The protocol does not allow the message, or it reports why the port-forward failed.
    pub fn receive(&mut self, mut message: Bytes) -> Result<(), PortForwardError> {
        if message.len() > RECEIVED_MAX {
            return Err(PortForwardError::Protocol("a message of more than 1 MiB"));
        }
        // An empty message and a message that is only a channel byte both carry nothing.
        if !message.has_remaining() {
            return Ok(());
        }
        match message.get_u8() {
            DATA => {
                self.begin(DATA, &mut message)?;
                self.data = message;
                Ok(())
            }
            ERROR => {
                self.begin(ERROR, &mut message)?;
                // The server writes the whole text and nothing after it.
                match message.is_empty() {
                    true => Ok(()),
                    false => Err(PortForwardError::reported(&message)),
                }
            }
            _ => Err(PortForwardError::Protocol("a channel that was not opened")),
        }
    }

    /// What the last message carried, once.
    pub fn next_data(&mut self) -> Option<Bytes> {
        let data = std::mem::take(&mut self.data);
        (!data.is_empty()).then_some(data)
    }

    /// Checks and removes the two bytes that open a channel, which may come in pieces.
    fn begin(&mut self, channel: u8, message: &mut Bytes) -> Result<(), PortForwardError> {
        let begun = &mut self.begun[usize::from(channel)];
        let port = self.port.to_le_bytes();
        while *begun < port.len() && message.has_remaining() {
            if message.get_u8() != port[*begun] {
                return Err(PortForwardError::Protocol(
                    "a channel began with another port",
                ));
            }
            *begun += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PORT: u16 = 8443;
    const PORT_BYTES: [u8; 2] = PORT.to_le_bytes();

    #[test]
    fn other_ports_channels_and_sizes_are_protocol_errors() {
        for bad in [
            vec![DATA, 0, 0],
            vec![DATA, PORT_BYTES[0], 0],
            vec![2, 1],
            vec![0; RECEIVED_MAX + 1],
        ] {
            let received = Channels::new(PORT).receive(bad.into());
            assert!(
                matches!(received, Err(PortForwardError::Protocol(_))),
                "{received:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn data_survives_any_cut_into_messages(data in prop::collection::vec(any::<u8>(), 0..500), cut in 1..100_usize) {
            let stream = [&PORT_BYTES[..], &data].concat();
            let mut channels = Channels::new(PORT);
            let mut received = Vec::new();
            for piece in stream.chunks(cut) {
                channels.receive([&[DATA], piece].concat().into()).unwrap();
                received.extend(channels.next_data().into_iter().flatten());
            }
            prop_assert_eq!(received, data);
        }

        #[test]
        fn any_messages_are_taken_without_panic(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..20)) {
            let mut channels = Channels::new(PORT);
            for message in messages {
                if channels.receive(message.into()).is_err() {
                    break;
                }
            }
        }
    }
}
