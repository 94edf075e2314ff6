/* A hypervisor of your own: it runs one guest, which asks for CPUID, and ends. Change it, then `./nvmx run --l2 .` again. */
#include <stdint.h>

struct registers { uint64_t rax, rbx, rcx, rdx; };
int vm_run(struct registers *registers, int launched);
extern char guest[], gdt[], image_end[];

/* The machine */

static inline void out8(uint16_t port, uint8_t value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void out32(uint16_t port, uint32_t value) { asm volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static inline uint8_t in8(uint16_t port)
{
    uint8_t value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline uint64_t rdmsr(uint32_t msr)
{
    uint32_t low, high;
    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    return (uint64_t)high << 32 | low;
}
static inline void wrmsr(uint32_t msr, uint64_t value)
{
    asm volatile("wrmsr" : : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)));
}
#define READ_REGISTER(name)                                        \
    static inline uint64_t read_##name(void)                       \
    {                                                              \
        uint64_t value;                                            \
        asm volatile("mov %%" #name ", %0" : "=r"(value));         \
        return value;                                              \
    }
READ_REGISTER(cr0)
READ_REGISTER(cr3)
READ_REGISTER(cr4)

/* Text: the first serial port, 115200 8N1 */

static void serial_init(void)
{
    out8(0x3F9, 0);                    /* no interrupts */
    out8(0x3FB, 0x80);
    out8(0x3F8, 1), out8(0x3F9, 0);    /* divisor */
    out8(0x3FB, 0x03);
}

static void put(char c)
{
    while (!(in8(0x3FD) & 0x20))
        ;
    out8(0x3F8, (uint8_t)c);
}
static void say(const char *text)
{
    for (; *text; text++)
        put(*text);
}
static void hex(uint64_t value)
{
    say("0x");
    int shift = 60;
    while (shift > 0 && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put("0123456789abcdef"[value >> shift & 15]);
}

/* The end: a record that says how it went, then the ports that end an emulated machine */
static void end(int failed)
{
    say(failed ? "@L2 end status=fail failed=1\n" : "@L2 end status=pass failed=0\n");
    while (!(in8(0x3FD) & 0x40))
        ;
    out32(0xF4, failed ? 0x11 : 0x10);
    for (const char *text = "Shutdown"; *text; text++)
        out8(0x8900, (uint8_t)*text);
    for (;;)
        asm volatile("cli; hlt");
}
static void fail(const char *text)
{
    say(text);
    say("\n");
    end(1);
}

/* VMX */

static uint8_t vmxon_region[4096] __attribute__((aligned(4096)));
static uint8_t vmcs[4096] __attribute__((aligned(4096)));

static int vmx(uint8_t failed) { return failed; }
static void vmwrite(uint64_t field, uint64_t value)
{
    uint8_t failed;
    asm volatile("vmwrite %2, %1; setna %0" : "=q"(failed) : "r"(field), "r"(value) : "cc");
    if (vmx(failed)) {
        say("VMWRITE failed for field ");
        hex(field);
        fail("");
    }
}
static uint64_t vmread(uint64_t field)
{
    uint64_t value = 0;
    asm volatile("vmread %1, %0" : "=r"(value) : "r"(field) : "cc");
    return value;
}
/* The controls that are wanted, those that must be 1, and none that must be 0 */
static uint64_t controls(uint32_t msr, uint32_t wanted)
{
    uint64_t allowed = rdmsr(msr);
    return (wanted | (uint32_t)allowed) & (uint32_t)(allowed >> 32);
}

static void enter_vmx(void)
{
    uint32_t a = 1, b, c = 0, d;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (!(c >> 5 & 1))
        fail("this CPU lacks VMX");
    if (!(rdmsr(0x3A) & 1))
        wrmsr(0x3A, rdmsr(0x3A) | 5); /* IA32_FEATURE_CONTROL: VMX, locked */
    uint64_t cr0 = (read_cr0() | rdmsr(0x486)) & rdmsr(0x487);
    uint64_t cr4 = ((read_cr4() | 1 << 13) | rdmsr(0x488)) & rdmsr(0x489);
    asm volatile("mov %0, %%cr0; mov %1, %%cr4" : : "r"(cr0), "r"(cr4));
    *(uint32_t *)vmxon_region = *(uint32_t *)vmcs = (uint32_t)rdmsr(0x480) & 0x7FFFFFFF;
    uint64_t region = (uint64_t)vmxon_region, pointer = (uint64_t)vmcs;
    uint8_t failed;
    asm volatile("vmxon %1; setna %0" : "=q"(failed) : "m"(region) : "cc", "memory");
    if (failed)
        fail("VMXON failed");
    asm volatile("vmclear %1; setna %0" : "=q"(failed) : "m"(pointer) : "cc", "memory");
    if (failed)
        fail("VMCLEAR failed");
    asm volatile("vmptrld %1; setna %0" : "=q"(failed) : "m"(pointer) : "cc", "memory");
    if (failed)
        fail("VMPTRLD failed");
}

static void fill_vmcs(void)
{
    vmwrite(0x4000, controls(0x481, 0));       /* pin-based */
    vmwrite(0x4002, controls(0x482, 1u << 7)); /* primary: HLT exits */
    vmwrite(0x400C, controls(0x483, 1u << 9)); /* exit: a 64-bit host */
    vmwrite(0x4012, controls(0x484, 1u << 9)); /* entry: a 64-bit guest */
    vmwrite(0x4004, 0);                        /* exception bitmap */
    vmwrite(0x400A, 0);                        /* CR3 targets */
    vmwrite(0x400E, 0), vmwrite(0x4010, 0), vmwrite(0x4014, 0); /* MSR lists */
    vmwrite(0x4016, 0);                        /* nothing to inject */
    vmwrite(0x6000, 0), vmwrite(0x6002, 0);    /* CR0 and CR4 masks */
    vmwrite(0x2800, ~0ull);                    /* no shadow VMCS */
    /* Host: what runs now */
    vmwrite(0x6C00, read_cr0()), vmwrite(0x6C02, read_cr3()), vmwrite(0x6C04, read_cr4());
    vmwrite(0x0C02, 0x08);
    for (uint64_t selector = 0x0C00; selector <= 0x0C0A; selector += 2)
        if (selector != 0x0C02)
            vmwrite(selector, 0x10);
    vmwrite(0x0C0C, 0x18);
    vmwrite(0x6C06, 0), vmwrite(0x6C08, 0), vmwrite(0x6C0A, 0);
    vmwrite(0x6C0C, (uint64_t)gdt), vmwrite(0x6C0E, 0);
    vmwrite(0x4C00, 0), vmwrite(0x6C10, 0), vmwrite(0x6C12, 0);
    /* Guest: the same, at its own first instruction */
    vmwrite(0x6800, read_cr0()), vmwrite(0x6802, read_cr3()), vmwrite(0x6804, read_cr4());
    for (uint64_t i = 0; i < 8; i++) { /* ES CS SS DS FS GS LDTR TR */
        static const uint16_t selectors[8] = { 0x10, 0x08, 0x10, 0x10, 0x10, 0x10, 0, 0x18 };
        static const uint32_t rights[8] = { 0xC093, 0xA09B, 0xC093, 0xC093, 0xC093, 0xC093, 0x10000, 0x8B };
        vmwrite(0x0800 + 2 * i, selectors[i]);
        vmwrite(0x4800 + 2 * i, i < 6 ? 0xFFFFFFFF : 0x67);
        vmwrite(0x4814 + 2 * i, rights[i]);
        vmwrite(0x6806 + 2 * i, 0);
    }
    vmwrite(0x6816, (uint64_t)gdt), vmwrite(0x6818, 0); /* GDTR, IDTR */
    vmwrite(0x4810, 39), vmwrite(0x4812, 0);
    vmwrite(0x681A, 0x400);                             /* DR7 */
    vmwrite(0x681E, (uint64_t)guest), vmwrite(0x681C, 0), vmwrite(0x6820, 2); /* RIP, RSP, RFLAGS */
    vmwrite(0x6822, 0), vmwrite(0x6824, 0), vmwrite(0x6826, 0), vmwrite(0x482A, 0); /* pending debug, SYSENTER */
    vmwrite(0x4824, 0), vmwrite(0x4826, 0), vmwrite(0x2802, 0); /* interruptibility, activity, DEBUGCTL */
}

void main(void *information, uint32_t magic)
{
    (void)information;
    serial_init();
    say("@L2 hello name=l2 version=1\n");
    if (magic != 0x2BADB002)
        fail("not started by a multiboot loader");
    enter_vmx();
    fill_vmcs();
    struct registers registers = { 0 };
    for (int launched = 0;; launched = 1) {
        if (vm_run(&registers, launched)) {
            say("VM entry failed with error ");
            hex(vmread(0x4400));
            fail("");
        }
        uint64_t reason = vmread(0x4402);
        /* A record that must be the same on the bare machine and under nvmx */
        say("@L2 check name=exit reason=");
        hex(reason);
        say(" qualification=");
        hex(vmread(0x6400));
        say("\n");
        switch (reason & 0x8000FFFF) {
        case 10: /* CPUID */
            registers.rbx = 0x2A;
            break;
        case 18: /* VMCALL */
            say("Hello from L2: my guest called, with ");
            hex(registers.rbx);
            say("\n");
            end(registers.rbx != 0x2A);
            break;
        default:
            fail("an exit that I do not know");
        }
        vmwrite(0x681E, vmread(0x681E) + vmread(0x440C)); /* after the instruction */
    }
}
