//! The stack against the kernel's own TCP, UDP and ICMP through a TUN device in a network namespace. Needs root, and says
//! so when it is skipped. Every test asserts the bytes that arrived, on both sides.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test that is surprised panics")]

mod lab;
mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use lab::services::{End, port};
use lab::{Lab, Setup, V4, V6, receive_stream, send_stream};
use socket2::{Domain, SockRef, Socket, Type};
use support::Impairment;

/// Runs `inside` for each of the setups, if laboratories are possible here.
fn each(setups: &[Setup], inside: impl Fn(&Lab, Setup) + Clone + Send + 'static) {
    if !lab::is_possible() {
        return;
    }
    for setup in setups.iter().copied() {
        let inside = inside.clone();
        lab::run(setup, move |lab| inside(lab, setup));
    }
}

/// Device offload on and off: two rather different ways through the stack.
fn both() -> [Setup; 2] {
    [
        Setup::default(),
        Setup {
            offload: false,
            ..Setup::default()
        },
    ]
}

fn sink(lab: &Lab, ip: IpAddr, len: u64) {
    let mut stream = lab.connect(ip, port::SINK);
    send_stream(&mut stream, u64::from(port::SINK) + 1, len);
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).expect("the sink's answer");
    assert_eq!(u64::from_be_bytes(answer), len);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    let record = lab.record(stream.local_addr().unwrap(), |record| {
        record.end != End::Open
    });
    assert_eq!((record.received, record.end), (len, End::Closed));
}

fn source(lab: &Lab, ip: IpAddr, len: u64) {
    let mut stream = lab.connect(ip, port::SOURCE);
    stream.write_all(&len.to_be_bytes()).unwrap();
    assert_eq!(receive_stream(&mut stream, u64::from(port::SOURCE)), len);
    let local = stream.local_addr().unwrap();
    drop(stream);
    assert_eq!(
        lab.record(local, |record| record.end != End::Open).end,
        End::Closed
    );
}

fn echo(lab: &Lab, ip: IpAddr, len: u64) {
    let mut stream = lab.connect(ip, port::ECHO);
    let mut writer = stream.try_clone().unwrap();
    let sender = thread::spawn(move || {
        send_stream(&mut writer, 99, len);
        writer.shutdown(Shutdown::Write).unwrap();
    });
    assert_eq!(receive_stream(&mut stream, 99), len);
    sender.join().unwrap();
    let record = lab.record(stream.local_addr().unwrap(), |record| {
        record.end != End::Open
    });
    assert_eq!((record.received, record.end), (len, End::Closed));
}

#[test]
fn bulk_arrives_at_every_mtu_with_and_without_offload() {
    let mut setups = Vec::new();
    for mtu in [576, 1280, 1500, 9000, 65_520] {
        for offload in [false, true] {
            setups.push(Setup {
                mtu,
                offload,
                checks: false,
                ..Setup::default()
            });
        }
    }
    each(&setups, |lab, setup| {
        for ip in [V4, V6] {
            if ip == V6 && setup.mtu < 1280 {
                continue;
            }
            sink(lab, ip, 4_000_000);
            source(lab, ip, 4_000_000);
            echo(lab, ip, 1_000_000);
        }
    });
}

#[test]
fn half_close_works_in_all_four_orders() {
    each(&both(), |lab, _| {
        // The program ends first and gets its answer.
        sink(lab, V4, 100_000);
        // The stack's side ends first; the program sends on, then ends.
        let mut stream = lab.connect(V6, port::FINISHES_FIRST);
        assert_eq!(
            receive_stream(&mut stream, u64::from(port::FINISHES_FIRST)),
            1000
        );
        send_stream(&mut stream, u64::from(port::FINISHES_FIRST) + 1, 700_000);
        stream.shutdown(Shutdown::Write).unwrap();
        let record = lab.record(stream.local_addr().unwrap(), |record| {
            record.end != End::Open
        });
        assert_eq!(
            (record.received, record.sent, record.end),
            (700_000, 1000, End::Closed)
        );
        // The program ends both directions at once while the other side still sends nothing.
        let stream = lab.connect(V4, port::ECHO);
        let local = stream.local_addr().unwrap();
        drop(stream);
        assert_eq!(
            lab.record(local, |record| record.end != End::Open).end,
            End::Closed
        );
        // The stack's side ends both after having read everything.
        source(lab, V6, 0);
    });
}

#[test]
fn both_ends_may_close_at_the_same_time() {
    let delay = Duration::from_millis(20);
    let impairment = Impairment {
        delay,
        ..Impairment::default()
    };
    each(
        &both().map(|setup| Setup {
            impairment,
            ..setup
        }),
        |lab, _| {
            let mut stream = lab.connect(V4, port::FINISHES_ON_BYTE);
            // Byte and FIN travel up while, 20 ms later, the FIN that answers the byte travels down.
            stream
                .write_all(&[support::byte(u64::from(port::FINISHES_ON_BYTE) + 1, 0)])
                .unwrap();
            thread::sleep(Duration::from_millis(25));
            stream.shutdown(Shutdown::Write).unwrap();
            assert_eq!(
                receive_stream(&mut stream, u64::from(port::FINISHES_ON_BYTE)),
                1000
            );
            let record = lab.record(stream.local_addr().unwrap(), |record| {
                record.end != End::Open
            });
            assert_eq!((record.received, record.end), (1, End::Closed));
        },
    );
}

#[test]
fn a_refused_port_is_connection_refused_at_once() {
    each(&both(), |_, _| {
        for ip in [V4, V6] {
            let start = Instant::now();
            let error = TcpStream::connect(SocketAddr::new(ip, port::REFUSED)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            assert!(
                start.elapsed() < Duration::from_millis(500),
                "{:?}",
                start.elapsed()
            );
        }
    });
}

#[test]
fn an_unreachable_host_is_host_unreachable_at_once() {
    each(&both(), |_, _| {
        for ip in [V4, V6] {
            let start = Instant::now();
            let error = TcpStream::connect(SocketAddr::new(ip, port::UNREACHABLE)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::HostUnreachable, "{error}");
            assert!(
                start.elapsed() < Duration::from_millis(500),
                "{:?}",
                start.elapsed()
            );
        }
    });
}

#[test]
fn a_filtered_port_times_out() {
    each(&both(), |_, _| {
        for silent in [port::SILENT, port::NEVER_DIALED] {
            let address = SocketAddr::new(V4, silent);
            let error =
                TcpStream::connect_timeout(&address, Duration::from_millis(1500)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut);
        }
    });
}

#[test]
fn connect_returns_when_the_dial_has_succeeded_and_not_before() {
    each(&both(), |lab, _| {
        let start = Instant::now();
        let mut stream = lab.connect(V4, port::SLOW_DIAL);
        assert!(
            start.elapsed() >= Duration::from_millis(300),
            "{:?}",
            start.elapsed()
        );
        send_stream(&mut stream, u64::from(port::SLOW_DIAL) + 1, 10_000);
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        assert_eq!(
            lab.record(stream.local_addr().unwrap(), |record| record.end
                == End::Closed)
                .received,
            10_000
        );
    });
}

/// Closes with RST instead of FIN.
fn reset(stream: TcpStream) {
    SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(stream);
}

#[test]
fn a_reset_by_the_program_reaches_the_owner_in_every_state() {
    each(&both(), |lab, _| {
        let ended = |local| lab.record(local, |record| record.end != End::Open).end;
        // ESTABLISHED, after bytes that still arrive.
        let mut stream = lab.connect(V4, port::SINK);
        send_stream(&mut stream, u64::from(port::SINK) + 1, 50_000);
        let local = stream.local_addr().unwrap();
        lab.record(local, |record| record.received == 50_000);
        reset(stream);
        assert_eq!(ended(local), End::Reset);
        // FIN-WAIT-2 at the program: it has ended, the owner has not.
        let stream = lab.connect(V6, port::SLOW_DIAL + 100);
        let local = stream.local_addr().unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        lab.record(local, |record| record.finished);
        reset(stream);
        assert_eq!(ended(local), End::Reset);
        // CLOSE-WAIT at the program: the owner has ended, it has not.
        let mut stream = lab.connect(V4, port::FINISHES_FIRST);
        let local = stream.local_addr().unwrap();
        assert_eq!(
            receive_stream(&mut stream, u64::from(port::FINISHES_FIRST)),
            1000
        );
        reset(stream);
        assert_eq!(ended(local), End::Reset);
        // Unread bytes make close() a reset.
        let stream = lab.connect(V6, port::FINISHES_FIRST);
        let local = stream.local_addr().unwrap();
        lab.record(local, |record| record.sent == 1000);
        thread::sleep(Duration::from_millis(20));
        drop(stream);
        assert_eq!(ended(local), End::Reset);
    });
}

#[test]
fn a_program_that_gives_up_dialing_is_noticed_when_the_dial_succeeds() {
    each(&both(), |lab, _| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let _ = socket.connect(&SocketAddr::new(V4, port::SLOW_DIAL).into());
        let local = socket.local_addr().unwrap().as_socket().unwrap();
        thread::sleep(Duration::from_millis(50));
        drop(socket);
        assert_eq!(
            lab.record(local, |record| record.end != End::Open).end,
            End::Reset
        );
    });
}

#[test]
fn a_reset_by_the_owner_reaches_the_program_in_every_state() {
    each(&both(), |lab, _| {
        let error = |stream: &mut TcpStream| loop {
            match stream.read(&mut [0; 4096]) {
                Ok(0) => panic!("FIN instead of RST"),
                Ok(_) => {}
                Err(error) => return error.kind(),
            }
        };
        // ESTABLISHED.
        let mut stream = lab.connect(V4, port::RESETS);
        stream
            .write_all(&[support::byte(u64::from(port::RESETS) + 1, 0)])
            .unwrap();
        assert_eq!(error(&mut stream), ErrorKind::ConnectionReset);
        // FIN-WAIT-2 at the owner: it has ended, then resets.
        let mut stream = lab.connect(V6, port::FINISHES_THEN_RESETS);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        stream
            .write_all(&[support::byte(u64::from(port::FINISHES_THEN_RESETS) + 1, 0)])
            .unwrap();
        lab.record(stream.local_addr().unwrap(), |record| {
            record.end == End::ResetByUs
        });
        thread::sleep(Duration::from_millis(50));
        let failed = stream.write_all(&[0]).unwrap_err().kind();
        assert!(
            matches!(failed, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset),
            "{failed:?}"
        );
        // CLOSE-WAIT at the owner: the program has ended.
        let mut stream = lab.connect(V4, port::RESETS_AFTER_FIN);
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(error(&mut stream), ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_reader_that_stalls_closes_the_window_and_loses_nothing() {
    each(&both(), |lab, _| {
        let mut stream = lab.connect(V4, port::STALLS);
        let start = Instant::now();
        send_stream(&mut stream, u64::from(port::STALLS) + 1, 8_000_000);
        assert!(
            start.elapsed() > Duration::from_millis(500),
            "8 MB did not wait for the reader"
        );
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(u64::from_be_bytes(answer), 8_000_000);
    });
}

#[test]
fn a_program_with_a_tiny_window_gets_everything() {
    each(&both(), |lab, _| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(1).unwrap();
        socket
            .connect(&SocketAddr::new(V4, port::SOURCE).into())
            .unwrap();
        let mut stream = TcpStream::from(socket);
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream.write_all(&300_000u64.to_be_bytes()).unwrap();
        // A pause with a full buffer: the window is zero.
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(
            receive_stream(&mut stream, u64::from(port::SOURCE)),
            300_000
        );
        let local = stream.local_addr().unwrap();
        drop(stream);
        assert_eq!(
            lab.record(local, |record| record.end != End::Open).end,
            End::Closed
        );
    });
}

#[test]
fn a_bad_link_delays_bytes_and_loses_none() {
    let mut setups = Vec::new();
    for seed in 1..=3 {
        for (loss, offload) in [(0, true), (1, false), (3, true)] {
            let delay = Duration::from_millis(2);
            let impairment = Impairment {
                loss,
                duplicate: 2,
                reorder: 5,
                delay,
            };
            setups.push(Setup {
                offload,
                impairment,
                seed,
                checks: false,
                ..Setup::default()
            });
        }
    }
    each(&setups, |lab, setup| {
        let ip = if setup.seed % 2 == 0 { V6 } else { V4 };
        sink(lab, ip, 300_000);
        source(lab, ip, 300_000);
        echo(lab, ip, 100_000);
    });
}

#[test]
fn many_flows_at_once_keep_their_bytes_apart() {
    each(
        &[Setup {
            checks: false,
            ..Setup::default()
        }],
        |lab, _| {
            let programs: Vec<_> = (0..64)
                .map(|number| {
                    let lab = lab.clone();
                    let ip = if number % 2 == 0 { V4 } else { V6 };
                    thread::spawn(move || match number % 3 {
                        0 => sink(&lab, ip, 200_000),
                        1 => source(&lab, ip, 200_000),
                        _ => echo(&lab, ip, 200_000),
                    })
                })
                .collect();
            for program in programs {
                program.join().unwrap();
            }
        },
    );
}

#[test]
fn ports_can_be_used_again_at_once() {
    each(
        &[Setup {
            checks: false,
            ..Setup::default()
        }],
        |lab, _| {
            for _ in 0..200 {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                socket
                    .bind(&"10.77.0.1:33333".parse::<SocketAddr>().unwrap().into())
                    .unwrap();
                let start = Instant::now();
                socket
                    .connect(&SocketAddr::new(V4, port::FINISHES_FIRST).into())
                    .unwrap();
                assert!(
                    start.elapsed() < Duration::from_millis(500),
                    "{:?}",
                    start.elapsed()
                );
                let mut stream = TcpStream::from(socket);
                assert_eq!(
                    receive_stream(&mut stream, u64::from(port::FINISHES_FIRST)),
                    1000
                );
                let local = stream.local_addr().unwrap();
                drop(stream);
                lab.record(local, |record| record.end == End::Closed);
            }
        },
    );
}

/// A namespace behind the laboratory's, which forwards for it over a route with this MTU.
fn behind_a_narrow_link<R: Send + 'static>(
    mtu: u16,
    inside: impl FnOnce() -> R + Send + 'static,
) -> R {
    let (thread_tx, thread_rx) = std::sync::mpsc::channel();
    let (ready_tx, ready_rx) = std::sync::mpsc::channel::<()>();
    let machine = thread::spawn(move || {
        lab::sys::enter_namespace().unwrap();
        thread_tx
            .send(std::fs::read_link("/proc/thread-self").unwrap())
            .unwrap();
        ready_rx.recv().unwrap();
        for command in [
            "link set lo up".to_owned(),
            "link set eth0 up".to_owned(),
            "addr add 10.78.0.2/24 dev eth0".to_owned(),
            "route add default via 10.78.0.1".to_owned(),
            "-6 addr add fd78::2/64 dev eth0 nodad".to_owned(),
            "-6 route add default via fd78::1".to_owned(),
        ] {
            lab::ip(&command);
        }
        inside()
    });
    let thread = thread_rx.recv().unwrap();
    let thread = thread.file_name().unwrap().display();
    for command in [
        format!("link add narrow type veth peer name eth0 netns {thread}"),
        "link set narrow up".to_owned(),
        "addr add 10.78.0.1/32 dev narrow".to_owned(),
        format!("route add 10.78.0.2/32 dev narrow mtu lock {mtu}"),
        "-6 addr add fd78::1/128 dev narrow nodad".to_owned(),
        format!("-6 route add fd78::2/128 dev narrow mtu lock {mtu}"),
    ] {
        lab::ip(&command);
    }
    for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
    }
    ready_tx.send(()).unwrap();
    machine.join().unwrap()
}

#[test]
fn a_narrower_link_on_the_way_shortens_the_segments() {
    each(&both(), |lab, _| {
        let lab = lab.clone();
        behind_a_narrow_link(1300, move || {
            for ip in [V4, V6] {
                source(&lab, ip, 400_000);
                sink(&lab, ip, 400_000);
            }
        });
    });
}

#[test]
fn datagrams_of_every_size_come_back() {
    each(&both(), |_, _| {
        for (bind, ip, longest) in [("0.0.0.0:0", V4, 65_507), ("[::]:0", V6, 65_487)] {
            let socket = UdpSocket::bind(bind).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            socket.connect(SocketAddr::new(ip, port::ECHO)).unwrap();
            for len in [0, 1, 512, 1472, 1473, 9000, longest] {
                let mut payload = vec![0; len];
                support::fill(len as u64, 0, &mut payload);
                socket.send(&payload).unwrap();
                let mut answer = vec![0; 65_536];
                let received = socket
                    .recv(&mut answer)
                    .unwrap_or_else(|error| panic!("{len} bytes to {ip}: {error}"));
                assert_eq!(&answer[..received], &payload[..]);
            }
        }
    });
}

#[test]
fn a_closed_udp_port_is_connection_refused() {
    each(&both(), |_, _| {
        for (bind, ip) in [("0.0.0.0:0", V4), ("[::]:0", V6)] {
            let socket = UdpSocket::bind(bind).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            socket
                .connect(SocketAddr::new(ip, port::UNREACHABLE))
                .unwrap();
            socket.send(b"anyone?").unwrap();
            assert_eq!(
                socket.recv(&mut [0; 10]).unwrap_err().kind(),
                ErrorKind::ConnectionRefused
            );
        }
    });
}

#[test]
fn pings_are_answered_by_the_owner() {
    each(&both(), |_, _| {
        for (ip, domain, protocol, request, reply) in [
            (V4, Domain::IPV4, socket2::Protocol::ICMPV4, 8u8, 0u8),
            (V6, Domain::IPV6, socket2::Protocol::ICMPV6, 128, 129),
        ] {
            let mut socket = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            socket.connect(&SocketAddr::new(ip, 0).into()).unwrap();
            for len in [0usize, 56, 4000] {
                let mut message = vec![0; 8 + len];
                message[0] = request;
                message[4..8].copy_from_slice(&[0x12, 0x34, 0, len as u8]);
                support::fill(5, 0, &mut message[8..]);
                if ip == V4 {
                    let sum = !smoltcp::wire::checksum::data(&message);
                    message[2..4].copy_from_slice(&sum.to_be_bytes());
                }
                socket.send(&message).unwrap();
                let mut answer = vec![0; 65_536];
                let received = loop {
                    let received = socket
                        .read(&mut answer)
                        .unwrap_or_else(|error| panic!("{len} to {ip}: {error}"));
                    let header = if ip == V4 { 20 } else { 0 };
                    answer.copy_within(header..received, 0);
                    if answer[0] == reply {
                        break received - header;
                    }
                };
                assert_eq!(&answer[4..received], &message[4..]);
            }
        }
    });
}
