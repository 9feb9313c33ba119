/* Hides AVX-512 and AMX from a program that goes by the processor alone, to measure it as if on one with AVX2:
 *
 *     cc -O2 -shared -fPIC -Wl,-z,initfirst -o hide_avx512.so hide_avx512.c && LD_PRELOAD=./hide_avx512.so PROGRAM
 *
 * The processor faults where the program asks what it can do (Linux' ARCH_SET_CPUID, `cpuid_fault` in /proc/cpuinfo),
 * and the handler answers in its place, without those instructions. Threads and child processes inherit it. Only the C
 * library, which asks before all others are loaded, knows more: it may copy memory by AVX-512. A program with a handler
 * of its own for SIGSEGV (Python with -X faulthandler) ends when it asks. Where the processor cannot do this, the program
 * ends with code 86.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012, FAULT = 0, ANSWER = 1 };

/* Of leaf 7: AVX-512 in all its parts, AMX, FP16. */
static const unsigned FEATURES_EBX =
    1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31;
static const unsigned FEATURES_ECX = 1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14;
static const unsigned FEATURES_EDX = 1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25;
/* Of leaf 7, subleaf 1: bf16 and FP16 of AVX-512 and AMX, AVX10. */
static const unsigned FEATURES_1_EAX = 1u << 5 | 1u << 21, FEATURES_1_EDX = 1u << 19;
/* Of leaf 13: the registers of AVX-512 and AMX among those that the system keeps. */
static const unsigned STATE_EAX = 1u << 5 | 1u << 6 | 1u << 7 | 1u << 17 | 1u << 18;

static long set_cpuid(int mode) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, mode); }

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *instruction = (const unsigned char *)registers[REG_RIP];
    if (instruction[0] != 0x0f || instruction[1] != 0xa2) { /* a fault of the program's own: as without this library */
        signal(number, SIG_DFL);
        if (info->si_code <= 0) raise(number); /* it was sent, and does not come again */
        return;
    }
    unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX], eax, ebx, ecx, edx;
    set_cpuid(ANSWER);
    __cpuid_count(leaf, subleaf, eax, ebx, ecx, edx);
    set_cpuid(FAULT);
    if (leaf == 7 && subleaf == 0) {
        ebx &= ~FEATURES_EBX;
        ecx &= ~FEATURES_ECX;
        edx &= ~FEATURES_EDX;
    }
    if (leaf == 7 && subleaf == 1) {
        eax &= ~FEATURES_1_EAX;
        edx &= ~FEATURES_1_EDX;
    }
    if (leaf == 13 && subleaf == 0) eax &= ~STATE_EAX;
    registers[REG_RAX] = eax;
    registers[REG_RBX] = ebx;
    registers[REG_RCX] = ecx;
    registers[REG_RDX] = edx;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGSEGV, &action, NULL) != 0 || set_cpuid(FAULT) != 0) _exit(86);
}
