# A guest that drives a nic of ours (common/datasheets): one packet with INTx, one with MSI-X.
#
# A multiboot kernel: as --32, ld -m elf_i386. It writes to the debug console (port 0xE9) "I" when the pin has interrupted
# and the packet is there, "M" when the vector has, "E" instead if there is no packet, and "." at the end. The firmware
# has given the BARs their addresses and has routed the pin to the interrupt controller (8259), line 8 to 15.

        .intel_syntax noprefix
        .code32

        .equ FUNCTION, 0x80000000 | 5 << 11     # bus 0, device 5
        .equ RING_BASE, 0x10
        .equ RING_ENTRIES, 0x18
        .equ CONTROL, 0x08
        .equ STATUS, 0x04
        .equ INTERRUPT, 0x24
        .equ DOORBELL, 0x800
        .equ MSIX, 0x40                         # the capability, in configuration space
        .equ MSIX_VECTOR, 0x60
        .equ IRQ8_VECTOR, 0x70                  # as the firmware has set the controller up
        .equ LOCAL_APIC_EOI, 0xFEE000B0

        .macro config_address offset
        mov eax, FUNCTION | \offset
        mov dx, 0xCF8
        out dx, eax
        mov dx, 0xCFC
        .endm
        .macro config_read offset
        config_address \offset
        in eax, dx
        .endm
        .macro config_write offset
        mov ecx, eax
        config_address \offset
        mov eax, ecx
        out dx, eax
        .endm
        .macro print letter
        mov al, \letter
        out 0xE9, al
        .endm
        .macro gate vector, handler             # vector: a register
        lea edx, [idt + \vector * 8]
        mov eax, offset \handler
        mov [edx], ax
        mov word ptr [edx + 2], 0x08
        mov word ptr [edx + 4], 0x8E00
        shr eax, 16
        mov [edx + 6], ax
        .endm
        .macro wait_for counter                 # an interrupt that comes before the hlt ends it
1:      cli
        cmp dword ptr [\counter], 0
        jne 2f
        sti
        hlt
        jmp 1b
2:
        .endm
        .macro check entry, letter
        cmp dword ptr [ring + 64 + \entry * 32 + 12], 1
        mov al, \letter
        je 3f
        mov al, 'E'
3:      out 0xE9, al
        .endm

        .section .text
        .globl _start
        .align 4
        .long 0x1BADB002, 0, -0x1BADB002
_start: mov esp, offset stack
        lgdt [gdt_pointer]
        ljmp 0x08:main
main:   mov ax, 0x10
        mov ds, ax
        mov ss, ax

        config_read 0x10
        and eax, -16
        mov edi, eax                            # BAR 0: registers
        config_read 0x20
        and eax, -16
        mov esi, eax                            # BAR 4: the table
        mov eax, 0x6                            # memory, bus master
        config_write 0x04

        config_read 0x3C
        and eax, 0x7
        mov ebx, eax                            # the line, from 8
        add eax, IRQ8_VECTOR
        mov ecx, eax
        gate ecx, pin
        mov ecx, MSIX_VECTOR
        gate ecx, vector
        lidt [idt_pointer]
        mov al, 0xFB                            # the second controller only, and of it the line only
        out 0x21, al
        mov eax, 1
        mov ecx, ebx
        shl eax, cl
        not eax
        out 0xA1, al

        mov dword ptr [edi + RING_BASE], offset ring
        mov dword ptr [edi + RING_BASE + 4], 0
        mov dword ptr [edi + RING_ENTRIES], 2
        mov dword ptr [edi + CONTROL], 1
4:      test dword ptr [edi + STATUS], 1
        jz 4b

        mov dword ptr [ring], 1
        mov dword ptr [edi + DOORBELL], 1
        wait_for pins
        check 0, 'I'

        mov dword ptr [esi], 0xFEE00000
        mov dword ptr [esi + 4], 0
        mov dword ptr [esi + 8], MSIX_VECTOR
        mov dword ptr [esi + 12], 0
        config_read MSIX
        or eax, 0x80000000
        config_write MSIX
        mov dword ptr [ring], 2
        mov dword ptr [edi + DOORBELL], 1
        wait_for vectors
        check 1, 'M'
        print '.'
5:      cli
        hlt
        jmp 5b

pin:    push eax
        mov dword ptr [edi + INTERRUPT], 1      # the level goes before the controller may look again
        inc dword ptr [pins]
        mov al, 0x20
        out 0xA0, al
        out 0x20, al
        pop eax
        iret

vector: inc dword ptr [vectors]
        mov dword ptr [LOCAL_APIC_EOI], 0
        iret

        .section .data
        .align 8
gdt:    .quad 0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF
gdt_pointer:
        .word 23
        .long gdt
idt_pointer:
        .word 2047
        .long idt
        .align 64
        .globl ring, packets
ring:   .fill 16, 4, 0
        .long packets, 0                         # entry: IOVA, size; done, sequence, length, checksum by the device
        .long 2048, 0
        .quad 0, 0
        .long packets + 2048, 0
        .long 2048, 0
        .quad 0, 0
pins:   .long 0
vectors:
        .long 0

        .section .bss
        .align 4096
packets:
        .space 4096
idt:    .space 2048
        .space 4096
stack:
