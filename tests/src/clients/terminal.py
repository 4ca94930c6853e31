"""A shell on a terminal: stops and continues a job, interrupts it, and reports the window's size."""
import fcntl, os, pty, re, select, struct, sys, termios, time
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
seen = b""
def until(pattern):
    global seen
    end = time.time() + 20
    while not re.search(pattern, seen):
        if time.time() > end:
            sys.exit("waited for %r and saw %r" % (pattern, seen))
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096)
    seen = b""
def say(text):
    os.write(terminal, text)
until(rb"READY> ")
say(b"stty size\n"); until(rb"33 101\r\n[^\n]*READY> ")
say(b"sleep 100\n"); time.sleep(0.5)
say(b"\x1a"); until(rb"Stopped[^\n]*\n[^\n]*READY> ")
say(b"fg\n"); time.sleep(0.5)
say(b"\x03"); until(rb"READY> ")
say(b"echo was $?\n"); until(rb"was 130\r\n[^\n]*READY> ")
say(b"exit 7\n")
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
