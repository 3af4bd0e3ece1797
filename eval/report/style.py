"""The style sheet of reports. tests/eval/test_html.py measures its contrasts in a browser."""

STYLE = """
:root{color-scheme:light dark;--paper:#fdfdfb;--ink:#1e1c19;--dim:#5f5a52;--rule:#ddd8cf;--link:#1c5790;
--s0:#1f6fb4;--s1:#b4520a;--s2:#2b7d3a;--s3:#b3263e;--s4:#7b4fa3;--s5:#0e7c86;--s6:#7a5a3a;--s7:#66625c;
--serif:Charter,"Bitstream Charter","Iowan Old Style","Source Serif 4",Georgia,"Liberation Serif",serif;
--sans:system-ui,-apple-system,"Segoe UI","Liberation Sans",Arial,sans-serif}
@media screen and (prefers-color-scheme:dark){:root{--paper:#161513;--ink:#e6e2db;--dim:#a9a298;
--rule:#38352f;--link:#8fbdec;--s0:#6fb1e8;--s1:#eda050;--s2:#7cc47f;--s3:#f0808c;--s4:#c3a0e6;--s5:#5cc6ce;
--s6:#cfa982;--s7:#b5b0a8}}
@media print{:root{color-scheme:light}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:1.0625rem/1.55 var(--serif)}
main{max-width:70rem;margin:0 auto;padding:3.5rem 1.5rem 4rem;overflow-wrap:anywhere}
h1{font-size:2rem;line-height:1.2;font-weight:600;margin:0 0 .6rem;text-wrap:balance}
h2{font-size:1.35rem;line-height:1.3;font-weight:600;margin:3rem 0 .8rem;padding-top:.9rem;
border-top:1px solid var(--rule)}
h3{font-size:1.05rem;line-height:1.35;font-weight:600;margin:1.6rem 0 .5rem}
p,.notes{max-width:42rem;margin:.5rem 0}
a{color:var(--link);text-underline-offset:.15em}
nav,table,dl,figcaption,.legend,svg text,footer,.gallery{font-family:var(--sans)}
nav{font-size:.85rem;margin:1.2rem 0 0}
nav a{margin-right:1rem;white-space:nowrap}
small,.dim,figcaption{color:var(--dim)}
abbr{text-decoration:none}
.notes{padding-left:1.2rem}
.notes li{margin:.25rem 0}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.3rem 1.2rem;margin:.8rem 0;
font-size:.85rem;line-height:1.45}
dt{color:var(--dim)}
dd{margin:0}
code{font:.92em/1.4 ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace}
.wrap{overflow-x:auto;margin:.9rem 0}
.wrap:focus-visible{outline:2px solid var(--link);outline-offset:3px}
table{border-collapse:collapse;font-size:.85rem;line-height:1.35;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--dim);padding-bottom:.4rem}
th,td{padding:.42rem 1.3rem .42rem 0;text-align:right;vertical-align:top;font-weight:400;
border-bottom:1px solid var(--rule);overflow-wrap:normal}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--dim);vertical-align:bottom;border-bottom:1px solid var(--dim);max-width:9rem}
th:first-child{text-align:left}
td small{display:block;font-size:.75rem;white-space:nowrap}
figure{margin:0}
img{display:block;max-width:100%;height:auto;border-radius:2px}
img.pixelated{image-rendering:pixelated}
.beside{font-size:.8rem}
.beside th,.beside td{border-bottom:0;text-align:left;padding:.3rem .7rem .3rem 0}
.beside thead th{border-bottom:0;width:8.5rem}
.beside tbody th{width:15rem;padding-right:1.4rem;overflow-wrap:anywhere}
.beside td{width:8.7rem}
.beside img{width:8rem}
.beside small{display:block;white-space:normal;margin-top:.2rem;font-size:.75rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:0 2.5rem}
.pair .beside tbody th{width:10rem}
.gallery{list-style:none;margin:.9rem 0;padding:0;display:grid;gap:1rem .4rem;
grid-template-columns:repeat(auto-fill,8rem)}
.large-images{grid-template-columns:repeat(auto-fill,10.8rem)}
.gallery img{width:100%}
.gallery figcaption{font-size:.75rem;line-height:1.35;margin-top:.35rem}
.gallery small{display:block;margin-top:.15rem;font-size:1em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1.8rem 2.5rem}
.charts>figure{max-width:34rem;min-width:0}
.charts h3{margin-top:.8rem}
.charts>.labelled{grid-column:1/-1;max-width:none;display:grid;gap:0 2.5rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
.labelled td,.labelled th{padding-top:.22rem;padding-bottom:.22rem;font-size:.8rem}
svg{display:block}
svg.chart{width:100%;height:auto}
svg text{font-size:13px;fill:var(--dim)}
svg .label{font-size:12px;fill:var(--c)}
svg .mid{text-anchor:middle}
svg .end{text-anchor:end}
.grid{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--dim);stroke-width:1;fill:none}
.line{stroke:var(--c);stroke-width:1.7;fill:none;stroke-linejoin:round}
.dot,.bar rect{fill:var(--c)}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}
.s4{--c:var(--s4)}.s5{--c:var(--s5)}.s6{--c:var(--s6)}.s7{--c:var(--s7)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin:.3rem 0 .5rem;padding:0;
font-size:.8rem}
.legend li{display:flex;align-items:center;gap:.45rem}
.legend svg{width:1.5rem;height:.5rem;flex:none}
.legend .line{stroke-width:2.4}
.legend rect{fill:var(--c)}
.bars{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.45rem 1rem;align-items:center;
max-width:42rem;margin:.6rem 0 1rem;font:.85rem/1.35 var(--sans)}
.bar{width:100%;height:.7rem}
.settings{columns:2 20rem;column-gap:3rem;display:block}
.settings div{display:grid;grid-template-columns:11rem minmax(0,1fr);gap:0 1rem;break-inside:avoid;
padding:.1rem 0}
.large{content-visibility:auto;contain-intrinsic-size:auto 60rem}
footer{margin-top:3rem;padding-top:.9rem;border-top:1px solid var(--rule);font-size:.8rem;color:var(--dim)}
@media (max-width:42rem){
main{padding:1.6rem 1rem 2.5rem}
h1{font-size:1.5rem}
h2{margin-top:2.2rem}
body{font-size:1rem}
dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:.5rem}
.settings div{grid-template-columns:minmax(0,2fr) minmax(0,3fr)}
.settings dd{margin:0}
th,td{padding-right:.7rem}
.metrics td small{white-space:normal}
.few,.few tbody,.few thead{display:block;width:100%}
.few tr{display:grid;grid-template-columns:repeat(var(--n),minmax(0,1fr));gap:.2rem .45rem;padding:.35rem 0}
.few tr>*,.few tbody th,.few thead th,.few td,.pair .few tbody th{width:auto;padding:0}
.few thead th{max-width:none;font-size:.72rem;line-height:1.25}
.few thead th:first-child{display:none}
.few tbody th{grid-column:1/-1}
.few img{width:100%}
.gallery,.large-images{grid-template-columns:repeat(3,minmax(0,1fr))}
.bars{grid-template-columns:1fr;gap:.1rem}
.bars svg{margin-bottom:.5rem}}
@media print{
body{font-size:10pt}
main{max-width:none;padding:0}
nav{display:none}
h2,h3,thead{break-after:avoid}
tr,li,svg,.charts>.plain{break-inside:avoid}
.charts,.charts>.labelled,.pair{display:block}
svg.chart{max-width:24rem}
.wrap{overflow:visible}
.large{content-visibility:visible}
svg *,img{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
