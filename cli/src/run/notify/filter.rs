//! Which system calls wait for the keeper: a program of classic BPF that the kernel runs on every one of them.
//!
//! Pure. It sees numbers only (`seccomp(2)`), so whatever lies behind a pointer is looked at by the keeper.

use libc::{c_long, sock_filter};

/// Offsets in `struct seccomp_data`, whose arguments have 64 bits each, the low half first on both architectures.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// `AUDIT_ARCH_*` of this build and of the 32-bit programs that the same kernel may run, with the numbers of the calls
/// that are refused to those: `socketcall`, `connect`, `io_uring_setup`.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURES: Option<(u32, u32, &[u32])> =
    Some((0xC000_003E, 0x4000_0003, &[102, 362, 425]));
#[cfg(target_arch = "aarch64")]
const ARCHITECTURES: Option<(u32, u32, &[u32])> = Some((0xC000_00B7, 0x4000_0028, &[283, 425]));
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHITECTURES: Option<(u32, u32, &[u32])> = None;

/// Numbers from here on are x32's, a second way to the same calls of x86-64.
const X32: u32 = 0x4000_0000;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

const PASS: u32 = libc::SECCOMP_RET_ALLOW;
const ASK: u32 = libc::SECCOMP_RET_USER_NOTIF;
const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// The filter, or `None` on an architecture whose numbers are not known here.
///
/// io_uring does not exist for the program, since its operations are no system calls. Programs of the 32-bit
/// architecture run, but have no sockets: their calls are others, and would go past the keeper.
pub(super) fn program() -> Option<Vec<sock_filter>> {
    let (native, narrow, forbidden) = ARCHITECTURES?;
    let mut foreign = vec![load(ARCHITECTURE)];
    foreign.extend(unless(narrow, vec![give(UNKNOWN)]));
    foreign.push(load(NUMBER));
    for number in forbidden {
        foreign.extend(on(*number, vec![give(UNKNOWN)]));
    }
    foreign.push(give(PASS));

    let mut program = vec![load(ARCHITECTURE)];
    program.extend(unless(native, foreign));
    program.push(load(NUMBER));
    if cfg!(target_arch = "x86_64") {
        program.extend([jump(AT_LEAST, X32, 0, 1), give(UNKNOWN)]);
    }
    program.extend(on(number(libc::SYS_io_uring_setup), vec![give(UNKNOWN)]));
    for call in [
        libc::SYS_connect,
        libc::SYS_sendmsg,
        libc::SYS_sendmmsg,
        libc::SYS_getpeername,
    ] {
        program.extend(on(number(call), vec![give(ASK)]));
    }
    program.extend(on(number(libc::SYS_sendto), with_destination()));
    program.extend(on(number(libc::SYS_getsockopt), for_error()));
    program.push(give(PASS));
    Some(program)
}

/// `sendto` on a connected socket, which is what `send` is, has no destination and stays fast.
fn with_destination() -> Vec<sock_filter> {
    const DESTINATION: u32 = ARGUMENTS + 4 * 8;
    vec![
        load(DESTINATION),
        jump(IS, 0, 0, 2),
        load(DESTINATION + 4),
        jump(IS, 0, 1, 0),
        give(ASK),
        give(PASS),
    ]
}

/// `getsockopt(…, SOL_SOCKET, SO_ERROR, …)`: how a non-blocking connect ended.
fn for_error() -> Vec<sock_filter> {
    vec![
        load(ARGUMENTS + 8),
        jump(IS, libc::SOL_SOCKET as u32, 0, 3),
        load(ARGUMENTS + 2 * 8),
        jump(IS, libc::SO_ERROR as u32, 0, 1),
        give(ASK),
        give(PASS),
    ]
}

fn number(call: c_long) -> u32 {
    u32::try_from(call).expect("system calls have small numbers")
}

/// `then` if the loaded word is `value`; it must end in a verdict.
fn on(value: u32, then: Vec<sock_filter>) -> Vec<sock_filter> {
    let mut block = vec![jump(IS, value, 0, short(then.len()))];
    block.extend(then);
    block
}

/// `then` if the loaded word is another than `value`; it must end in a verdict.
fn unless(value: u32, then: Vec<sock_filter>) -> Vec<sock_filter> {
    let mut block = vec![jump(IS, value, short(then.len()), 0)];
    block.extend(then);
    block
}

fn short(length: usize) -> u8 {
    u8::try_from(length).expect("blocks are shorter than a jump reaches")
}

fn load(offset: u32) -> sock_filter {
    sock_filter {
        code: LOAD,
        jt: 0,
        jf: 0,
        k: offset,
    }
}

fn give(verdict: u32) -> sock_filter {
    sock_filter {
        code: RETURN,
        jt: 0,
        jf: 0,
        k: verdict,
    }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would do with a call.
    fn verdict(architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_le_bytes());
        data.extend(architecture.to_le_bytes());
        data.extend([0; 8]);
        arguments
            .iter()
            .for_each(|argument| data.extend(argument.to_le_bytes()));
        let program = program().expect("tests run where the product does");
        let (mut at, mut word) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            match step.code {
                LOAD => {
                    let bytes = &data[step.k as usize..][..4];
                    word = u32::from_le_bytes(bytes.try_into().unwrap());
                }
                IS => at += usize::from(if word == step.k { step.jt } else { step.jf }),
                AT_LEAST => at += usize::from(if word >= step.k { step.jt } else { step.jf }),
                RETURN => return step.k,
                other => panic!("no such instruction: {other}"),
            }
        }
    }

    fn native(call: c_long, arguments: [u64; 6]) -> u32 {
        let (native, ..) = ARCHITECTURES.unwrap();
        verdict(native, number(call), arguments)
    }

    #[test]
    fn what_opens_a_way_out_asks_and_the_rest_passes() {
        let none = [0; 6];
        for call in [
            libc::SYS_connect,
            libc::SYS_sendmsg,
            libc::SYS_sendmmsg,
            libc::SYS_getpeername,
        ] {
            assert_eq!(native(call, none), ASK, "{call}");
        }
        for call in [
            libc::SYS_read,
            libc::SYS_write,
            libc::SYS_bind,
            libc::SYS_recvmsg,
        ] {
            assert_eq!(native(call, none), PASS, "{call}");
        }
        assert_eq!(native(libc::SYS_io_uring_setup, none), UNKNOWN);
    }

    #[test]
    fn sends_ask_only_with_a_destination_wherever_it_lies() {
        let to = |pointer| native(libc::SYS_sendto, [3, 1, 2, 0, pointer, 16]);

        assert_eq!(to(0), PASS);
        assert_eq!(to(0x1000), ASK);
        assert_eq!(to(0x7fff_0000_0000), ASK, "the low half is zero");
    }

    #[test]
    fn only_the_error_of_a_socket_is_asked_for() {
        let option = |level, name| native(libc::SYS_getsockopt, [3, level, name, 0, 0, 0]);

        assert_eq!(option(1, 4), ASK);
        assert_eq!(option(1, 3), PASS);
        assert_eq!(option(6, 4), PASS);
    }

    #[test]
    fn programs_of_other_architectures_have_no_sockets() {
        let (own, narrow, forbidden) = ARCHITECTURES.unwrap();
        for number in forbidden {
            assert_eq!(verdict(narrow, *number, [0; 6]), UNKNOWN, "{number}");
        }
        assert_eq!(verdict(narrow, 4, [0; 6]), PASS);
        assert_eq!(verdict(0x8000_0016, 4, [0; 6]), UNKNOWN, "never seen");
        if cfg!(target_arch = "x86_64") {
            let connect = number(libc::SYS_connect);
            assert_eq!(verdict(own, X32 | connect, [0; 6]), UNKNOWN);
        }
    }
}
