# From the loader's 32-bit protected mode to 64-bit C: page tables for the first 4 GiB one to one, then main.
    .section .header, "a"
    .align 4
header:                                 # Multiboot 0.6.96: modules on pages, memory map, address fields
    .long 0x1BADB002, 0x10003, -(0x1BADB002 + 0x10003)
    .long header, image_start, image_load_end, image_end, start

    .text
    .code32
    .global start
start:
    cli
    mov $stack_top, %esp
    mov %ebx, %edi                      # the loader's information, for main
    mov %eax, %ebp
    # Four page directories of 2 MiB pages
    mov $directories, %eax
    mov $0x83, %ecx                     # present, writable, large
1:  mov %ecx, (%eax)
    movl $0, 4(%eax)
    add $0x200000, %ecx
    add $8, %eax
    cmp $directories + 4 * 4096, %eax
    jne 1b
    movl $pointers + 3, level4
    movl $directories + 3, pointers
    movl $directories + 4096 + 3, pointers + 8
    movl $directories + 8192 + 3, pointers + 16
    movl $directories + 12288 + 3, pointers + 24
    mov $level4, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax                      # PAE
    mov %eax, %cr4
    mov $0xC0000080, %ecx               # IA32_EFER: long mode
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000020, %eax                # paging, and NE, which VMX wants
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $0x08, $long_mode
    .code64
long_mode:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %eax, %fs
    mov %eax, %gs
    mov $0x18, %eax
    ltr %ax
    mov %ebp, %esi
    call main
2:  cli                                 # a halt with interrupts off ends the run too
    hlt
    jmp 2b

# int vm_run(struct registers *, int launched): 0 after an exit, else 1: the VM entry failed
    .global vm_run
vm_run:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    push %rdi
    mov $0x6C14, %eax                   # HOST_RSP
    vmwrite %rsp, %rax
    mov $0x6C16, %eax                   # HOST_RIP
    mov $vm_exit, %edx
    vmwrite %rdx, %rax
    mov 8(%rdi), %rbx
    mov 16(%rdi), %rcx
    mov 24(%rdi), %rdx
    mov (%rdi), %rax
    test %esi, %esi
    jnz 1f
    vmlaunch
    jmp 2f
1:  vmresume
2:  pop %rdi
    mov $1, %eax
    jmp 3f
vm_exit:
    push %rdi
    mov 8(%rsp), %rdi
    mov %rax, (%rdi)
    mov %rbx, 8(%rdi)
    mov %rcx, 16(%rdi)
    mov %rdx, 24(%rdi)
    add $16, %rsp
    xor %eax, %eax
3:  pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

# The guest, L3: it asks for CPUID, says hello with the answer in EBX, and is done.
    .global guest
guest:
    mov $0x4C33, %eax                   # a leaf of our own
    cpuid
    mov $1, %eax
    vmcall
    ud2

    .data
    .align 16
    .global gdt
gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF
    .quad 0x0000890000000067, 0         # a TSS at 0, which VMX wants to be there
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt

    .bss
    .align 4096
level4:      .skip 4096
pointers:    .skip 4096
directories: .skip 4 * 4096
stack:       .skip 16384
stack_top:
