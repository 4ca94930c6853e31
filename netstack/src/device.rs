//! smoltcp's idea of a network card: exactly one packet in, or exactly one buffer out.
//!
//! smoltcp polls a device until it is empty. These devices hold the one packet being processed, so that only its flow is
//! touched. They know nothing of what is in it.

use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use crate::outbox::Outbox;

/// Capabilities of a link on which smoltcp leaves checksums alone. `burst` is the largest packet the device cuts up.
pub(crate) fn capabilities(
    mtu: usize,
    burst_v4: Option<usize>,
    burst_v6: Option<usize>,
) -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ip;
    capabilities.max_transmission_unit = mtu;
    capabilities.checksum = ChecksumCapabilities::ignored();
    capabilities.segmentation.tcpv4 = burst_v4.and_then(std::num::NonZeroUsize::new);
    capabilities.segmentation.tcpv6 = burst_v6.and_then(std::num::NonZeroUsize::new);
    capabilities
}

/// Hands over one packet; what smoltcp answers at once goes to the outbox.
pub(crate) struct Ingress<'a> {
    pub(crate) packet: Option<&'a [u8]>,
    pub(crate) outbox: &'a mut Outbox,
    pub(crate) capabilities: &'a DeviceCapabilities,
}

impl Device for Ingress<'_> {
    type RxToken<'t>
        = Received<'t>
    where
        Self: 't;
    type TxToken<'t>
        = Answer<'t>
    where
        Self: 't;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Answer<'_>)> {
        let packet = self.packet.take()?;
        Some((Received(packet), Answer(self.outbox)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Answer<'_>> {
        Some(Answer(self.outbox))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.capabilities.clone()
    }
}

/// Takes one packet, written straight into the caller's buffer.
pub(crate) struct Egress<'a> {
    pub(crate) buffer: &'a mut [u8],
    /// Length of the packet, once there is one.
    pub(crate) written: Option<usize>,
    pub(crate) capabilities: &'a DeviceCapabilities,
}

impl Device for Egress<'_> {
    type RxToken<'t>
        = Received<'t>
    where
        Self: 't;
    type TxToken<'t>
        = Fill<'t>
    where
        Self: 't;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Fill<'_>)> {
        None
    }

    fn transmit(&mut self, _: Instant) -> Option<Fill<'_>> {
        let Self {
            buffer, written, ..
        } = self;
        written.is_none().then_some(Fill { buffer, written })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.capabilities.clone()
    }
}

pub(crate) struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

pub(crate) struct Answer<'a>(&'a mut Outbox);

impl TxToken for Answer<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.0.push_with(len, f)
    }
}

pub(crate) struct Fill<'a> {
    buffer: &'a mut [u8],
    written: &'a mut Option<usize>,
}

impl TxToken for Fill<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        *self.written = Some(len);
        f(&mut self.buffer[..len])
    }
}
